"""What a run may continue from: options compared, data known by their index."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ecn_dist.config import CheckpointConfig, Config, DataConfig, flatten, load
from ecn_dist.errors import UserError
from ecn_dist.methods.options import MemoryOptions
from ecn_dist.reporting.run_reader import SUMMARY, read_mapping
from ecn_dist.training.checkpoint import CheckpointStore
from ecn_dist.training.run import Run, differences

DATA = {"source": "s" * 64, "target": "t" * 64}


def config(tmp_path: Path, **changes: Any) -> Config:
    return replace(Config(source="S", target="T", output_dir=str(tmp_path / "run")), **changes)


def claim(of: Config, data: dict[str, str] = DATA, device: str = "cpu") -> bool:
    with Run(of, data, device) as run:
        return run.claim()


def starting_point(of: Config, data: dict[str, str] = DATA, device: str = "cpu") -> Path | None:
    return Run(of, data, device).checkpoint()


def begin(of: Config, checkpoint: Path | None) -> None:
    Run(of, DATA).begin(checkpoint)


def save(run: Path, step: int, of: Config, data: dict[str, str] = DATA) -> Path:
    store = CheckpointStore(run / "checkpoints", keep=9)
    store.save(step, {"weight": torch.zeros(2)}, {"config": flatten(of), "data": data})
    return run / "checkpoints" / f"step-{step:08d}"


def test_differences() -> None:
    stored = flatten(Config())
    same_results = Config(
        source="elsewhere",
        output_dir="r",
        device="cpu",
        data=DataConfig(workers=7),
        checkpoint=CheckpointConfig(keep=9),
    )
    assert differences(stored, flatten(same_results)) == []
    other = Config(seed=3, memory=MemoryOptions(momentum=0.02))
    assert differences(stored, flatten(other)) == ["seed: 0 -> 3", "memory.momentum: 0.01 -> 0.02"]


def test_an_engine_is_another_rounding_in_full_precision_only() -> None:
    assert differences(flatten(Config()), flatten(Config(engine="deepspeed"))) == []
    low = Config(precision="bf16")
    assert differences(flatten(low), flatten(replace(low, engine="deepspeed")))


def test_options_of_a_later_version_count_with_their_defaults() -> None:
    older = flatten(Config())
    del older["memory.start"]
    assert differences(older, flatten(Config())) == []
    assert differences(older, flatten(Config(memory=MemoryOptions(start="weights"))))


def test_a_fresh_start(tmp_path: Path) -> None:
    assert claim(config(tmp_path), DATA)
    assert starting_point(config(tmp_path), DATA) is None
    assert flatten(load(tmp_path / "run" / "config.yaml")) == flatten(config(tmp_path))


def test_the_newest_is_continued(tmp_path: Path) -> None:
    claim(config(tmp_path), DATA)
    for step in (10, 20):
        newest = save(tmp_path / "run", step, config(tmp_path))
    (tmp_path / "run" / "checkpoints" / "tmp-step-00000030").mkdir()
    assert claim(config(tmp_path, source="moved/S"), DATA)
    assert starting_point(config(tmp_path, source="moved/S"), DATA) == newest
    assert not (tmp_path / "run" / "checkpoints" / "tmp-step-00000030").exists()


def test_changed_options_are_refused_unless_allowed(tmp_path: Path) -> None:
    claim(config(tmp_path), DATA)
    newest = save(tmp_path / "run", 10, config(tmp_path))
    changed = config(tmp_path, epochs=90, seed=1)
    with pytest.raises(UserError, match=r"seed: 0 -> 1; epochs: 60 -> 90.*--resume_changed allow"):
        claim(changed, DATA)
    assert load(tmp_path / "run" / "config.yaml").epochs == 60
    allowed = replace(changed, resume_changed="allow")
    assert claim(allowed, DATA)
    assert starting_point(allowed, DATA) == newest
    begin(allowed, None)
    assert load(tmp_path / "run" / "config.yaml").epochs == 90


def test_mistakes_before_the_first_step_do_not_bind_the_folder(tmp_path: Path) -> None:
    claim(config(tmp_path, seed=7), DATA)
    (tmp_path / "run" / "logs").mkdir()
    for resume in ("auto", "never"):
        assert claim(config(tmp_path, resume=resume), DATA)
    begin(config(tmp_path), None)
    assert flatten(load(tmp_path / "run" / "config.yaml")) == flatten(config(tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        claim(config(tmp_path, seed=7), DATA)
    with pytest.raises(UserError, match="resume is never"):
        claim(config(tmp_path, resume="never"), DATA)


def test_other_data_at_the_same_place_are_refused(tmp_path: Path) -> None:
    claim(config(tmp_path), DATA)
    newest = save(tmp_path / "run", 10, config(tmp_path))
    repacked = DATA | {"target": "u" * 64}
    with pytest.raises(UserError, match="target: other data"):
        starting_point(config(tmp_path), repacked)
    Run(config(tmp_path), DATA).finish({}, finished=True)
    assert not claim(config(tmp_path), DATA)
    with pytest.raises(UserError, match=r"another run.*target: other data"):
        claim(config(tmp_path), repacked)
    assert starting_point(config(tmp_path, resume_changed="allow"), repacked) == newest


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    claim(config(tmp_path), DATA)
    summary = tmp_path / "run" / SUMMARY
    summary.write_text("{}")
    assert not claim(config(tmp_path), DATA)
    with pytest.raises(UserError, match="finished"):
        claim(config(tmp_path, resume="elsewhere"), DATA)
    assert summary.exists()


def test_a_run_is_finished_when_its_summary_says_so(tmp_path: Path) -> None:
    """The report is drawn from summary.json, and so it comes later; a run killed between them makes it up."""
    run = tmp_path / "run"
    claim(config(tmp_path), DATA)
    Run(config(tmp_path), DATA).finish({"steps": 7}, finished=False)
    assert claim(config(tmp_path), DATA)
    Run(config(tmp_path), DATA).finish({"steps": 7}, finished=True)
    assert not claim(config(tmp_path), DATA)
    summary = read_mapping(run / SUMMARY)
    assert summary is not None
    assert summary["steps"] == 7
    assert summary["machine"]["torch"] == torch.__version__
    (run / SUMMARY).write_text('{"steps": 7')
    with pytest.raises(UserError, match=r"summary\.json.*remove it"):
        claim(config(tmp_path), DATA)


RESULTS = ("summary.json", "MODEL_CARD.md", "report.html", "figures/cmc.png", "figures/findings.json")


def finish(run: Path, of: Config) -> None:
    """What a finished run leaves, as far as it matters here, and a file of its user's."""
    save(run, 10, of)
    (run / "figures").mkdir()
    for name in (*RESULTS, "weights.safetensors", "notes.txt"):
        (run / name).write_text("{}")


def test_a_finished_run_that_goes_on_has_no_result_until_its_new_end(tmp_path: Path) -> None:
    run, longer = tmp_path / "run", config(tmp_path, epochs=90, resume_changed="allow")
    claim(config(tmp_path), DATA)
    finish(run, config(tmp_path))
    assert claim(longer, DATA)
    assert starting_point(longer, DATA) == run / "checkpoints" / "step-00000010"
    # Until it is certain that it goes on, all is as it was: the checkpoint may not fit the new options.
    assert all((run / name).is_file() for name in (*RESULTS, "weights.safetensors"))
    assert flatten(load(run / "config.yaml")) == flatten(config(tmp_path))
    begin(longer, None)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoints", "config.yaml", "notes.txt"]
    assert flatten(load(run / "config.yaml")) == flatten(longer)


@pytest.mark.parametrize("gone", range(len(RESULTS) + 1))
def test_results_that_were_half_removed_are_removed_by_the_next_start(tmp_path: Path, gone: int) -> None:
    """The summary goes first and the weights last, so that no part of a result passes for a whole one."""
    run = tmp_path / "run"
    claim(config(tmp_path), DATA)
    finish(run, config(tmp_path))
    for name in RESULTS[:gone]:
        (run / name).unlink()
    begin(config(tmp_path, epochs=90), None)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoints", "config.yaml", "notes.txt"]


def test_a_run_cut_off_before_its_end_keeps_what_was_made_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(config(tmp_path), DATA)
    for name in ("report.html", "MODEL_CARD.md"):  # of `report`, and of an export of one of its checkpoints
        (run / name).write_text("made by hand")
    begin(config(tmp_path), None)
    assert (run / "report.html").is_file()
    assert (run / "MODEL_CARD.md").is_file()


def test_a_named_checkpoint(tmp_path: Path) -> None:
    other = tmp_path / "other"
    named = save(other, 10, config(tmp_path))
    newest = save(other, 20, config(tmp_path))
    assert starting_point(config(tmp_path, resume=str(named)), DATA) == named
    assert starting_point(config(tmp_path, resume=str(other)), DATA) == newest
    assert newest.exists()
    with pytest.raises(UserError, match="seed"):
        starting_point(config(tmp_path, resume=str(named), seed=1), DATA)
    with pytest.raises(UserError, match="no complete checkpoint"):
        starting_point(config(tmp_path, resume=str(tmp_path / "absent")), DATA)
    (other / "checkpoints" / "step-00000010" / "meta.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        starting_point(config(tmp_path, resume=str(named)), DATA)


def test_going_back_in_ones_own_run_sets_the_rest_aside(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step, config(tmp_path))
    first = tmp_path / "run" / "checkpoints" / "step-00000010"
    second = first.with_name("step-00000020")
    assert starting_point(config(tmp_path, resume=str(first)), DATA) == first
    assert starting_point(config(tmp_path), DATA) == second  # nothing is moved before the run begins
    begin(config(tmp_path), first)
    assert starting_point(config(tmp_path), DATA) == first
    assert (first.parent / "superseded-step-00000020").is_dir()


def test_a_second_continuation_keeps_what_the_first_one_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(config(tmp_path))
    finish(run, config(tmp_path))
    first = run / "checkpoints" / "step-00000010"
    for _ in range(2):
        save(run, 20, config(tmp_path))
        begin(config(tmp_path), first)
    aside = {path.name for path in first.parent.iterdir()}
    assert aside == {"step-00000010", "superseded-step-00000020", "superseded-2-step-00000020"}


def test_what_a_run_does_not_go_on_from_is_no_newer_than_what_it_saves(tmp_path: Path) -> None:
    for step in (7, 8):
        own = save(tmp_path / "run", step, config(tmp_path))
    elsewhere = save(tmp_path / "other", 2, config(tmp_path))
    begin(config(tmp_path), elsewhere)
    newer = save(tmp_path / "run", 3, config(tmp_path))
    assert starting_point(config(tmp_path), DATA) == newer
    for part in newer.glob("*.safetensors"):  # the right size, and rubbish
        part.write_bytes(bytes(part.stat().st_size))
    assert starting_point(config(tmp_path), DATA) is None
    begin(config(tmp_path), None)
    assert {path.name.split("step")[0] for path in own.parent.iterdir()} == {"superseded-"}


def test_nothing_is_removed_where_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    claim(config(tmp_path))
    finish(run, config(tmp_path))

    def refuse(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(CheckpointStore, "set_aside_after", refuse)
    with pytest.raises(UserError, match=r"cannot be written .*Directory not empty"):
        begin(config(tmp_path, epochs=90), run / "checkpoints" / "step-00000010")
    (run / "metrics.jsonl").write_text('{"step": 0}\nbroken\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        begin(config(tmp_path, epochs=90), None)
    assert all((run / name).is_file() for name in (*RESULTS, "weights.safetensors"))
    assert load(run / "config.yaml").epochs == 60


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    """Of this process or another, with the same or other options."""
    with Run(config(tmp_path), DATA) as run:
        assert run.claim()
        for other in (config(tmp_path), config(tmp_path, seed=1)):
            with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on "):
                claim(other)
    assert claim(config(tmp_path))


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("ecn_dist.training.run.log.propagate", True)
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert claim(config(tmp_path))
    assert "no lock keeps a second training out" in caplog.text


def test_a_lock_that_leads_elsewhere_empties_nothing(tmp_path: Path) -> None:
    victim, lock = tmp_path / "victim", tmp_path / "run" / ".lock"
    victim.write_text("precious")
    lock.parent.mkdir()
    lock.symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock cannot be opened .*; remove it"):
        claim(config(tmp_path))
    assert victim.read_text() == "precious"


def test_another_kind_of_device_changes_results(tmp_path: Path) -> None:
    claim(config(tmp_path))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(10, {"weight": torch.zeros(2)}, {"config": flatten(config(tmp_path)), "data": DATA, "device": "cuda"})
    for refusing in (claim, starting_point):
        with pytest.raises(UserError, match="kind of device: cuda -> cpu"):
            refusing(config(tmp_path))
    assert claim(config(tmp_path), device="cuda")


def test_an_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"output_dir: \S*run is a file"):
        claim(config(tmp_path))


def test_a_broken_config_of_the_folder_is_named(tmp_path: Path) -> None:
    claim(config(tmp_path))
    save(tmp_path / "run", 10, config(tmp_path))
    (tmp_path / "run" / "config.yaml").write_text("unheard_of: 1\n")
    with pytest.raises(UserError, match=r"output_dir: \S*config\.yaml cannot be read .*unheard_of"):
        claim(config(tmp_path))
