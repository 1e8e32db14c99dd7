"""Whole trainings that go on from checkpoints which do not fit, or end in an evaluation that fails."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ecn_dist import train
from ecn_dist.data import ShardIndex
from ecn_dist.training.checkpoint import META
from ecn_dist.training.trainer import Trainer
from tests.dataset_folders import pack_folder, write_market
from tests.fuzz.material import METHODS, options, pack_validation


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    pack_folder(write_market(folder / "market"), folder / "shards", camera_style="histogram")
    pack_validation(folder)
    return folder / "shards"


@pytest.fixture(scope="module")
def runs(shards: Path) -> Path:
    """A finished run of each method, with its name."""
    for method in METHODS:
        assert train.main(options(method, shards, shards.parent / method)) == 0
    return shards.parent


def unfinished(runs: Path, method: str, to: Path) -> Path:
    """A copy of a run as a kill before its end would leave it."""
    shutil.copytree(runs / method, to)
    (to / "summary.json").unlink()
    (to / "weights.safetensors").unlink()
    return max((to / "checkpoints").iterdir())  # the newest


def go_on(method: str, shards: Path, run: Path, *more: str) -> int:
    return train.main([*options(method, shards, run), *more])


def test_from_fp32_to_fp16_where_that_is_allowed(
    runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished(runs, "ecn", tmp_path / "run")
    wanted = ["--precision", "fp16", "--epochs", "3"]
    assert go_on("ecn", shards, tmp_path / "run", *wanted) == 2
    assert "precision: fp32 -> fp16" in capsys.readouterr().err
    assert go_on("ecn", shards, tmp_path / "run", *wanted, "--resume_changed", "allow") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_steps"] == 0 or summary["steps"] > summary["skipped_steps"]


def test_a_step_beyond_the_end(runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = unfinished(runs, "ecn", tmp_path / "run")
    meta = json.loads((checkpoint / META).read_text())
    (checkpoint / META).write_text(json.dumps(meta | {"step": 99}))
    checkpoint.rename(checkpoint.with_name("step-00000099"))
    assert go_on("ecn", shards, tmp_path / "run") == 2
    assert f"is at step 99, and this run ends at step {meta['step']}; give more epochs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("label", "said"), [(2**40, f"labels from -1 to {2**40}"), (-7, "labels from -7")])
def test_labels_that_no_cluster_has(
    runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: int, said: str
) -> None:
    checkpoint = unfinished(runs, "cluster", tmp_path / "run")
    path = next(checkpoint.glob("*.safetensors"))
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load(path)
    tensors["cluster.labels"][0] = label
    if label > 0:
        tensors["cluster.labels"][1] = -1
    save_file(tensors, path, about)
    meta = json.loads((checkpoint / META).read_text())
    meta["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / META).write_text(json.dumps(meta))
    assert go_on("cluster", shards, tmp_path / "run", "--epochs", "3", "--resume_changed", "allow") == 2
    told = capsys.readouterr().err
    assert said in told
    assert f"resume: {checkpoint}: " in told


def test_an_evaluation_that_fails_does_not_cost_the_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Trainer, index: ShardIndex | None, what: str) -> None:
        if index is not None:
            raise ZeroDivisionError

    monkeypatch.setattr(Trainer, "evaluate", fail)
    with pytest.raises(ZeroDivisionError):
        go_on("ecn", shards, tmp_path / "run")
    monkeypatch.undo()
    weights = tmp_path / "run" / "weights.safetensors"
    assert torch.isfinite(next(iter(load(weights).values()))).all()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert go_on("ecn", shards, tmp_path / "run") == 0


def load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
