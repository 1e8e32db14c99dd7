"""Checkpoints on one process: complete or absent, found, kept, and checked file by file."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecn_dist.errors import UserError
from ecn_dist.training.checkpoint import META, CheckpointStore, damage, load, read_meta


def state(value: float = 1.0, rows: int = 100) -> dict[str, Tensor]:
    images_last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    return {"weight": torch.full((rows, 8), value), "convolution": images_last, "count": torch.tensor(7)}


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_was_saved_is_loaded(store: CheckpointStore) -> None:
    saved = state(3.0)
    store.save(12, saved, {"skipped_steps": 1})
    found = store.newest()
    assert found is not None
    filled = {key: torch.zeros_like(tensor) for key, tensor in saved.items()}
    meta = load(found, filled)
    for key in saved:
        assert torch.equal(filled[key], saved[key])
    assert (meta["step"], meta["skipped_steps"], meta["world_size"]) == (12, 1, 1)


def test_nothing_saved(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.complete() == []
    store.finish()
    assert not store.is_writing


def test_in_the_background_later_changes_do_not_reach_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, asynchronous=True)
    saved = state(3.0)
    store.save(1, saved, {})
    saved["weight"].fill_(9.0)
    assert store.newest() is None  # no name before `finish`
    store.finish()
    assert not store.is_writing
    newest = store.newest()
    assert newest is not None
    filled = state(0.0)
    load(newest, filled)
    assert (filled["weight"] == 3.0).all()


def test_the_next_save_completes_the_one_in_flight(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, asynchronous=True)
    store.save(1, state(), {})
    store.save(2, state(), {})
    assert [path.name for path in store.complete()] == ["step-00000001"]
    store.finish()
    assert [path.name for path in store.complete()] == ["step-00000001", "step-00000002"]


def test_the_newest_are_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        store.save(step, state(), {})
    assert names(store) == ["step-00000002", "step-00000003"]


def test_the_best_and_stated_epochs_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, keep_best=True, keep_epochs=(0, 4))
    # The trapezoid's area is largest where all pictures tie, at epoch 3.
    areas = {1: (0.2, 0.2), 2: (0.5, 0.5), 3: (0.6, 0.3), 5: (0.4, 0.4)}
    for epoch in range(6):
        area, stepwise = areas.get(epoch, (0.0, 0.0))
        figures = {"data": "validation", "mAP": area, "mAP_stepwise": stepwise} if epoch in areas else None
        # What the target's test queries say, which chooses nothing, is best at epoch 1.
        evaluation = {"mAP": 0.9, "mAP_stepwise": 0.9 - epoch / 10}
        store.save(epoch, state(), {"ended_epoch": epoch, "evaluation": evaluation, "validation": figures})
    assert names(store) == [f"step-0000000{epoch}" for epoch in (0, 2, 4, 5)]
    best = store.best()
    assert best is not None
    assert (best["step"], best["validation"]["mAP_stepwise"]) == (2, 0.5)


def test_the_best_is_one_of_those_evaluated_on_the_newest_validation_data(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, keep_best=True)
    assert store.best() is None
    for step, (data, area) in enumerate((("easier", 0.9), ("ours", 0.3), ("ours", 0.4), ("ours", 0.2), ("ours", 0.4))):
        store.save(step, state(), {"validation": {"data": data, "mAP_stepwise": area}})
    store.save(5, state(), {"validation": None})  # on a signal
    assert names(store) == ["step-00000002", "step-00000005"]


def test_a_shard_cut_short_makes_way_for_the_older_one(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecn_dist.training.checkpoint.log.propagate", True)
    for step in (1, 2):
        store.save(step, state(), {})
    shard = next((store.folder / "step-00000002").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    newest = store.newest()
    assert newest is not None
    assert newest.name == "step-00000001"
    assert f"{len(whole) - 10} bytes where {META} says {len(whole)}" in caplog.text
    # Trained again, the damaged one is replaced.
    store.save(2, state(), {})
    assert store.newest() == store.folder / "step-00000002"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 2}'])
def test_meta_data_cut_short(store: CheckpointStore, text: str) -> None:
    store.save(1, state(), {})
    store.save(2, state(), {})
    (store.folder / "step-00000002" / META).write_text(text)
    assert damage(store.folder / "step-00000002")
    assert store.newest() == store.folder / "step-00000001"
    with pytest.raises(UserError, match="damaged"):
        read_meta(store.folder / "step-00000002")


def test_a_missing_shard(store: CheckpointStore) -> None:
    store.save(1, state(), {})
    next((store.folder / "step-00000001").glob("*.safetensors")).unlink()
    assert store.newest() is None


def test_what_a_killed_save_left_is_removed(store: CheckpointStore) -> None:
    store.save(1, state(), {})
    left = store.folder / "tmp-step-00000002"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert store.newest() == store.folder / "step-00000001"
    store.remove_unfinished()
    assert names(store) == ["step-00000001"]


def test_later_ones_are_set_aside(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.save(step, state(), {})
    aside = store.set_aside_after(1)
    assert names(store) == ["step-00000001", "superseded-step-00000002"]
    assert aside == [store.folder / "superseded-step-00000002"]
    assert store.newest() == store.folder / "step-00000001"


@pytest.fixture
def full_disk() -> Any:
    """No file may grow beyond 64 KiB in this process: a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_older_one(tmp_path: Path, full_disk: None, asynchronous: bool) -> None:
    store = CheckpointStore(tmp_path, asynchronous=asynchronous)
    store.save(1, state(rows=1), {})
    store.finish()

    def save_what_is_too_large() -> None:
        store.save(2, state(rows=10_000), {})
        store.finish()

    with pytest.raises(UserError, match=r"step-00000002 could not be written .*earlier checkpoints are untouched"):
        save_what_is_too_large()
    assert names(store) == ["step-00000001"]  # nor does half of the other fill the disk
    assert damage(store.folder / "step-00000001") is None
    store.save(3, state(rows=1), {})
    store.finish()
    assert names(store) == ["step-00000001", "step-00000003"]


def test_tensors_of_another_network(store: CheckpointStore) -> None:
    store.save(1, state(), {})
    with pytest.raises(UserError, match=r"more is missing, weight is \(100, 8\) and not \(50, 8\)"):
        load(store.folder / "step-00000001", {"weight": torch.zeros(50, 8), "more": torch.zeros(3)})


def test_nothing_in_it_is_pickled(store: CheckpointStore) -> None:
    store.save(1, state(), {"config": {"seed": 3}})
    files = sorted(path.name for path in (store.folder / "step-00000001").iterdir())
    assert files == [META, "shard-00001-model-00001-of-00001.safetensors"]
    meta = json.loads((store.folder / "step-00000001" / META).read_text())
    assert meta["files"] == {files[1]: (store.folder / "step-00000001" / files[1]).stat().st_size}


@pytest.mark.parametrize("content", ["flipped", "zeros"])
def test_a_shard_of_other_content_makes_way_for_the_older_one(store: CheckpointStore, content: str) -> None:
    for step in (1, 2):
        store.save(step, state(), {})
    shard = next((store.folder / "step-00000002").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content == "flipped" else bytes(len(whole)))
    assert damage(shard.parent, contents=False) is None
    assert f"its {shard.name} is not as it was written" in str(damage(shard.parent))
    assert store.newest() == store.folder / "step-00000001"


def test_a_stray_file_is_damage(store: CheckpointStore) -> None:
    store.save(1, state(), {})
    (store.folder / "step-00000001" / "stray.safetensors").write_bytes(b"rubbish")
    assert "does not know its stray.safetensors" in str(damage(store.folder / "step-00000001"))


def test_checkpoints_of_release_0_1_are_read(store: CheckpointStore) -> None:
    """They are known by having neither a version nor sha256s."""
    store.save(1, state(2.0), {})
    path = store.folder / "step-00000001" / META
    meta = json.loads(path.read_text())
    assert meta.keys() >= {"version", "sha256"}
    path.write_text(json.dumps({key: meta[key] for key in ("step", "world_size", "files")}))
    assert store.newest() == path.parent
    filled = state(0.0)
    load(path.parent, filled)
    assert (filled["weight"] == 2.0).all()


@pytest.mark.parametrize("version", [3, "2", None])
def test_a_later_version_is_refused_and_not_passed_over(store: CheckpointStore, version: object) -> None:
    store.save(1, state(), {})
    store.save(2, state(), {})
    path = store.folder / "step-00000002" / META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(UserError, match=rf"format version {version!r}.*up to 2"):
        store.newest()


def test_what_is_set_aside_twice_gets_a_free_name(store: CheckpointStore) -> None:
    for _ in range(3):
        store.save(1, state(), {})
        store.save(2, state(), {})
        store.set_aside_after(1)
    aside = ["superseded-2-step-00000002", "superseded-3-step-00000002", "superseded-step-00000002"]
    assert names(store) == ["step-00000001", *aside]
    assert store.complete() == [store.folder / "step-00000001"]


def test_an_old_one_that_cannot_be_removed_is_no_failed_save(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecn_dist.training.checkpoint.log.propagate", True)
    for step in (1, 2):
        store.save(step, state(), {})
    (store.folder / "tmp-step-00000001").mkdir()  # in the way of the new name, and not empty
    (store.folder / "tmp-step-00000001" / "file").touch()
    store.save(3, state(), {})
    assert "an old checkpoint could not be removed" in caplog.text
    assert store.newest() == store.folder / "step-00000003"


def test_an_interrupt_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The thread that writes is waited for: cut off inside torch it would abort the process."""
    code = f"""
import sys, time, torch
from pathlib import Path
from ecn_dist import distributed
from ecn_dist.training.checkpoint import CheckpointStore
write = distributed.PendingSave.write
distributed.PendingSave.write = lambda part: (time.sleep(1), write(part))[1]
store = CheckpointStore(Path({str(tmp_path)!r}), asynchronous=True)
store.save(1, {{"weight": torch.zeros(1000)}}, {{}})
sys.exit(130)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")
    assert len(list((tmp_path / "tmp-step-00000001").glob("*.safetensors"))) == 1
