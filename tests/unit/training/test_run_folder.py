"""What a run may continue from: options compared, data known by their index."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ecn_dist.config import CheckpointConfig, Config, DataConfig, flatten, load
from ecn_dist.errors import UserError
from ecn_dist.methods.options import MemoryOptions
from ecn_dist.training import run_folder
from ecn_dist.training.checkpoint import CheckpointStore

DATA = {"source": "s" * 64, "target": "t" * 64}


def config(tmp_path: Path, **changes: Any) -> Config:
    return replace(Config(source="S", target="T", output_dir=str(tmp_path / "run")), **changes)


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
    assert run_folder.differences(stored, flatten(same_results)) == []
    other = Config(seed=3, memory=MemoryOptions(momentum=0.02))
    assert run_folder.differences(stored, flatten(other)) == ["seed: 0 -> 3", "memory.momentum: 0.01 -> 0.02"]


def test_an_engine_is_another_rounding_in_full_precision_only() -> None:
    assert run_folder.differences(flatten(Config()), flatten(Config(engine="deepspeed"))) == []
    low = Config(precision="bf16")
    assert run_folder.differences(flatten(low), flatten(replace(low, engine="deepspeed")))


def test_options_of_a_later_version_count_with_their_defaults() -> None:
    older = flatten(Config())
    del older["memory.start"]
    assert run_folder.differences(older, flatten(Config())) == []
    assert run_folder.differences(older, flatten(Config(memory=MemoryOptions(start="weights"))))


def test_a_fresh_start(tmp_path: Path) -> None:
    assert run_folder.claim(config(tmp_path), DATA)
    assert run_folder.starting_point(config(tmp_path), DATA) is None
    assert load(tmp_path / "run" / "config.yaml") == config(tmp_path)


def test_the_newest_is_continued(tmp_path: Path) -> None:
    run_folder.claim(config(tmp_path), DATA)
    for step in (10, 20):
        newest = save(tmp_path / "run", step, config(tmp_path))
    (tmp_path / "run" / "checkpoints" / "tmp-step-00000030").mkdir()
    assert run_folder.claim(config(tmp_path, source="moved/S"), DATA)
    assert run_folder.starting_point(config(tmp_path, source="moved/S"), DATA) == newest
    assert not (tmp_path / "run" / "checkpoints" / "tmp-step-00000030").exists()


def test_changed_options_are_refused_unless_allowed(tmp_path: Path) -> None:
    run_folder.claim(config(tmp_path), DATA)
    newest = save(tmp_path / "run", 10, config(tmp_path))
    changed = config(tmp_path, epochs=90, seed=1)
    with pytest.raises(UserError, match=r"seed: 0 -> 1; epochs: 60 -> 90.*--resume_changed allow"):
        run_folder.claim(changed, DATA)
    assert load(tmp_path / "run" / "config.yaml").epochs == 60
    allowed = replace(changed, resume_changed="allow")
    assert run_folder.claim(allowed, DATA)
    assert run_folder.starting_point(allowed, DATA) == newest
    run_folder.begin(allowed, None)
    assert load(tmp_path / "run" / "config.yaml").epochs == 90


def test_mistakes_before_the_first_step_do_not_bind_the_folder(tmp_path: Path) -> None:
    run_folder.claim(config(tmp_path, seed=7), DATA)
    (tmp_path / "run" / "logs").mkdir()
    for resume in ("auto", "never"):
        assert run_folder.claim(config(tmp_path, resume=resume), DATA)
    run_folder.begin(config(tmp_path), None)
    assert load(tmp_path / "run" / "config.yaml") == config(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        run_folder.claim(config(tmp_path, seed=7), DATA)
    with pytest.raises(UserError, match="resume is never"):
        run_folder.claim(config(tmp_path, resume="never"), DATA)


def test_other_data_at_the_same_place_are_refused(tmp_path: Path) -> None:
    run_folder.claim(config(tmp_path), DATA)
    newest = save(tmp_path / "run", 10, config(tmp_path))
    repacked = DATA | {"target": "u" * 64}
    with pytest.raises(UserError, match="target: other data"):
        run_folder.starting_point(config(tmp_path), repacked)
    run_folder.write_summary(tmp_path / "run", {}, finished=True)
    assert not run_folder.claim(config(tmp_path), DATA)
    with pytest.raises(UserError, match=r"another run.*target: other data"):
        run_folder.claim(config(tmp_path), repacked)
    assert run_folder.starting_point(config(tmp_path, resume_changed="allow"), repacked) == newest


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run_folder.claim(config(tmp_path), DATA)
    summary = tmp_path / "run" / run_folder.SUMMARY
    summary.write_text("{}")
    assert not run_folder.claim(config(tmp_path), DATA)
    with pytest.raises(UserError, match="finished"):
        run_folder.claim(config(tmp_path, resume="elsewhere"), DATA)
    assert summary.exists()


def test_a_run_is_finished_when_its_summary_says_so(tmp_path: Path) -> None:
    """The report is drawn from summary.json, and so it comes later; a run killed between them makes it up."""
    run = tmp_path / "run"
    run_folder.claim(config(tmp_path), DATA)
    run_folder.write_summary(run, {"steps": 7}, finished=False)
    assert run_folder.claim(config(tmp_path), DATA)
    run_folder.write_summary(run, {"steps": 7}, finished=True)
    assert not run_folder.claim(config(tmp_path), DATA)
    summary = run_folder.read_summary(run)
    assert summary is not None
    assert summary["steps"] == 7
    assert summary["machine"]["torch"] == torch.__version__
    (run / run_folder.SUMMARY).write_text('{"steps": 7')
    with pytest.raises(UserError, match=r"summary\.json.*remove it"):
        run_folder.claim(config(tmp_path), DATA)


RESULTS = ("summary.json", "MODEL_CARD.md", "report.html", "figures/cmc.png", "figures/findings.json")


def finish(run: Path, of: Config) -> None:
    """What a finished run leaves, as far as it matters here, and a file of its user's."""
    save(run, 10, of)
    (run / "figures").mkdir()
    for name in (*RESULTS, "weights.safetensors", "notes.txt"):
        (run / name).write_text("{}")


def test_a_finished_run_that_goes_on_has_no_result_until_its_new_end(tmp_path: Path) -> None:
    run, longer = tmp_path / "run", config(tmp_path, epochs=90, resume_changed="allow")
    run_folder.claim(config(tmp_path), DATA)
    finish(run, config(tmp_path))
    assert run_folder.claim(longer, DATA)
    assert run_folder.starting_point(longer, DATA) == run / "checkpoints" / "step-00000010"
    # Until it is certain that it goes on, all is as it was: the checkpoint may not fit the new options.
    assert all((run / name).is_file() for name in (*RESULTS, "weights.safetensors"))
    assert load(run / "config.yaml") == config(tmp_path)
    run_folder.begin(longer, None)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "notes.txt"]
    assert load(run / "config.yaml") == longer


@pytest.mark.parametrize("gone", range(len(RESULTS) + 1))
def test_results_that_were_half_removed_are_removed_by_the_next_start(tmp_path: Path, gone: int) -> None:
    """The summary goes first and the weights last, so that no part of a result passes for a whole one."""
    run = tmp_path / "run"
    run_folder.claim(config(tmp_path), DATA)
    finish(run, config(tmp_path))
    for name in RESULTS[:gone]:
        (run / name).unlink()
    run_folder.begin(config(tmp_path, epochs=90), None)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "notes.txt"]


def test_a_run_cut_off_before_its_end_keeps_what_was_made_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder.claim(config(tmp_path), DATA)
    for name in ("report.html", "MODEL_CARD.md"):  # of `report`, and of an export of one of its checkpoints
        (run / name).write_text("made by hand")
    run_folder.begin(config(tmp_path), None)
    assert (run / "report.html").is_file()
    assert (run / "MODEL_CARD.md").is_file()


def test_a_named_checkpoint(tmp_path: Path) -> None:
    other = tmp_path / "other"
    named = save(other, 10, config(tmp_path))
    newest = save(other, 20, config(tmp_path))
    assert run_folder.starting_point(config(tmp_path, resume=str(named)), DATA) == named
    assert run_folder.starting_point(config(tmp_path, resume=str(other)), DATA) == newest
    assert newest.exists()
    with pytest.raises(UserError, match="seed"):
        run_folder.starting_point(config(tmp_path, resume=str(named), seed=1), DATA)
    with pytest.raises(UserError, match="no complete checkpoint"):
        run_folder.starting_point(config(tmp_path, resume=str(tmp_path / "absent")), DATA)
    (other / "checkpoints" / "step-00000010" / "meta.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        run_folder.starting_point(config(tmp_path, resume=str(named)), DATA)


def test_going_back_in_ones_own_run_sets_the_rest_aside(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step, config(tmp_path))
    first = tmp_path / "run" / "checkpoints" / "step-00000010"
    second = first.with_name("step-00000020")
    assert run_folder.starting_point(config(tmp_path, resume=str(first)), DATA) == first
    assert run_folder.starting_point(config(tmp_path), DATA) == second  # nothing is moved before the run begins
    run_folder.begin(config(tmp_path), first)
    assert run_folder.starting_point(config(tmp_path), DATA) == first
    assert (first.parent / "superseded-step-00000020").is_dir()
