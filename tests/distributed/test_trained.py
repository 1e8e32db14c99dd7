"""Loading a trained model on several ranks: rank 0 says what is loaded, and a rank that does not see it ends all."""

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.config import dump, load
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, fingerprint_backbone
from ecn_dist.training.checkpoint import CheckpointStore
from ecn_dist.training.trained import load_trained
from tests.trained_cases import write_trained_run

CPU = torch.device("cpu")


def fingerprint(backbone: Backbone) -> str:
    return fingerprint_backbone(backbone, 64, 32)


def loaded(folders: list[Path]) -> str:
    """The fingerprint of what this rank loads, each rank from its own folder: hosts that do not share a disk."""
    return fingerprint(load_trained(folders[distributed.rank()], CPU)[0])


def error(folders: list[Path]) -> str:
    with pytest.raises(UserError) as raised:
        loaded(folders)
    assert raised.value.on_all_ranks
    return str(raised.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with exported weights, and a checkpoint of another model than they are."""
    run = write_trained_run(tmp_path_factory.mktemp("trained") / "run")
    other = load_trained(write_trained_run(run.parent / "other", seed=1), CPU)[0]
    save_checkpoint(run, 5, other)
    assert fingerprint(other) != loaded([run])
    return run


def save_checkpoint(run: Path, step: int, backbone: Backbone) -> None:
    state = {f"network.backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}
    CheckpointStore(run / "checkpoints", keep=9).save(step, state, {})


def copy(run: Path, folder: Path, *, without: str) -> Path:
    shutil.copytree(run, folder)
    lost = folder / without
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    return folder


def test_all_ranks_load_the_same(ranks, run: Path, tmp_path: Path) -> None:
    assert set(ranks(2).run(loaded, [run, run])) == {loaded([run])}
    only_checkpoint = copy(run, tmp_path / "checkpoint", without="weights.safetensors")
    of_checkpoint = loaded([only_checkpoint])
    assert of_checkpoint != loaded([run])
    assert set(ranks(2).run(loaded, [only_checkpoint, only_checkpoint])) == {of_checkpoint}


def test_rank_0_decides(ranks, run: Path, tmp_path: Path) -> None:
    """What one rank sees more than rank 0, as a file system shows a file later to one host, is no other model."""
    only_checkpoint = copy(run, tmp_path / "checkpoint", without="weights.safetensors")
    assert set(ranks(2).run(loaded, [only_checkpoint, run])) == {loaded([only_checkpoint])}
    newer = copy(run, tmp_path / "newer", without="weights.safetensors")
    save_checkpoint(newer, 9, load_trained(run, CPU)[0])
    assert loaded([newer]) == loaded([run])
    assert set(ranks(2).run(loaded, [only_checkpoint, newer])) == {loaded([only_checkpoint])}
    config = load(newer / "config.yaml")
    (newer / "config.yaml").write_text(dump(replace(config, model=replace(config.model, arch="resnet18"))))
    assert set(ranks(2).run(loaded, [only_checkpoint, newer])) == {loaded([only_checkpoint])}


@pytest.mark.parametrize(
    ("rank_0_lacks", "rank_1_lacks", "named"),
    [
        ("notes.txt", "weights.safetensors", "weights.safetensors"),
        ("weights.safetensors", "checkpoints", "checkpoints/step-00000005"),
        ("weights.safetensors", "checkpoints/step-00000005/meta.json", "checkpoints/step-00000005"),
    ],
)
def test_a_rank_that_does_not_see_the_files_is_named(
    ranks, run: Path, tmp_path: Path, rank_0_lacks: str, rank_1_lacks: str, named: str
) -> None:
    (run / "notes.txt").touch()
    folders = [copy(run, tmp_path / "0", without=rank_0_lacks), copy(run, tmp_path / "1", without=rank_1_lacks)]
    said = set(ranks(2).run(error, folders, timeout=60.0))
    assert len(said) == 1
    assert f"rank 1 on host {socket.gethostname()}" in (text := said.pop())
    assert str(folders[1] / named) in text
    assert "rank 0 on host" not in text
    assert "a file system that all hosts share" in text


def test_no_model_and_damage_are_errors_on_all_ranks(ranks, run: Path, tmp_path: Path) -> None:
    empty = copy(run, tmp_path / "empty", without="weights.safetensors")
    shutil.rmtree(empty / "checkpoints")
    assert "holds neither weights.safetensors nor a complete checkpoint" in error([empty])
    assert set(ranks(2).run(error, [empty, empty])) == {error([empty])}
    # A checkpoint that is named is not passed over where it is damaged, as the newest of a run folder is.
    part = next((copy(run, tmp_path / "cut", without="weights.safetensors") / "checkpoints").glob("*/*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    assert f"its {part.name} has" in (text := error([part.parent]))
    assert "Name another checkpoint" in text
    assert "rank 1" in ranks(2).run(error, [run / "checkpoints" / "step-00000005", part.parent])[0]
    broken = copy(run, tmp_path / "broken", without="checkpoints")
    (broken / "weights.safetensors").write_bytes(b"no tensors")
    assert "cannot be read as a file of plain tensors" in ranks(2).run(error, [run, broken])[0]
