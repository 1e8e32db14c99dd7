"""HHL, FMCL and CamStyle over small runs: equal on any ranks, continued to the bit, without the target's identities."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist.data import ShardIndex
from ecn_dist.memory import GatheredBatch
from ecn_dist.train import main
from tests.dataset_folders import pack_folder, write_market
from tests.integration.test_unlabelled_target import carry_draws, permuted, without_identities
from tests.integration.training import assert_equal_runs, checkpoint_steps, final_tensors, loss_lines, train_on
from tests.ranks import RankPool

# Three steps an epoch: one epoch on the source alone, then two of the method.
SMALL = {
    "global_batch_size": 12,
    "data.streams": 12,
    "data.height": 32,
    "data.width": 16,
    "data.workers": 0,
    "model.arch": "thin_convnet",
    "model.weights": "none",
    "model.embedding_dim": 16,
    "optim.source_only_epochs": 1,
    "epochs": 2,
    "optim.lr": 0.01,
    "optim.backbone_lr": 0.01,
    "precision": "fp64",
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 9,
    "logging.every_steps": 1,
    "logging.tensorboard": False,
    "logging.figures": False,
}
OPTIONS = {
    "hhl": {"hhl.source_identities": 4, "hhl.instances": 3, "hhl.target_pictures": 12},
    "fmcl": {"loss.num_neighbors": 4, "loss.neighbors_from_epoch": 1, "fmcl.momentum_from_epoch": 1},
    "camstyle": {"camstyle.copies": 12},
}
WITH_TARGET = ("hhl", "fmcl")


class Family:
    """Runs of the methods on a source and a target of 36 training pictures each, with style copies."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self._folder, self._ranks = folder, ranks
        self.target = folder / "target"
        for domain in ("source", "target"):
            data = write_market(folder / "data" / domain, identities=6)
            pack_folder(data, folder / domain, camera_style="histogram", min_shards=2)

    def run(self, method: str, world_size: int, folder: Path | None = None, target: Path | None = None) -> Path:
        """The run folder: with no `folder` that of the one run that all tests share."""
        run = folder or self._folder / f"{method}-{world_size}"
        if folder is None and run.exists():
            return run
        options = SMALL | OPTIONS[method] | {"method": method, "source": self._folder / "source", "output_dir": run}
        options["target"] = target or self.target
        argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        assert ({main(argv)} if world_size == 1 else train_on(self._ranks, world_size, argv)) == {0}
        return run


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Family:
    return Family(tmp_path_factory.mktemp("family"), ranks)


def losses(run: Path) -> Tensor:
    """(steps, parts)"""
    lines = [line for line in loss_lines(run) if "loss" in line]
    return torch.tensor(
        [[value or 0.0 for key, value in line.items() if key.startswith("loss")] for line in lines], dtype=torch.float64
    )


@pytest.mark.parametrize("method", OPTIONS)
def test_float64_runs_are_equal_on_any_ranks(family: Family, method: str) -> None:
    one, two, three = (family.run(method, world_size) for world_size in (1, 2, 3))
    expected, tensors = losses(one), final_tensors(one)
    assert len(expected) == 9
    assert (expected[4:] > 0).all()  # fmcl's bank is empty at its first step, and its loss 0
    for run in (two, three):
        torch.testing.assert_close(losses(run), expected, rtol=1e-8, atol=0)
        found = final_tensors(run)
        for key in found:
            if not key.startswith("ranks."):
                torch.testing.assert_close(found[key], tensors[key], rtol=0, atol=1e-8, msg=key)


@pytest.mark.parametrize("method", OPTIONS)
def test_continued_in_the_middle_of_an_epoch_to_the_bit(family: Family, method: str, tmp_path: Path) -> None:
    whole, broken = family.run(method, 2), tmp_path / "broken"
    shutil.copytree(whole, broken)
    for step in checkpoint_steps(broken):
        if step > 4:  # as if it had been killed after its first step with the target
            shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    for name in ("summary.json", "weights.safetensors"):
        (broken / name).unlink()
    assert_equal_runs(family.run(method, 2, broken), whole)


@pytest.mark.parametrize("method", WITH_TARGET)
def test_removing_the_pids_changes_no_parameter(family: Family, method: str, tmp_path: Path) -> None:
    unlabelled = without_identities(family.target, tmp_path / "unlabelled")
    with_pids, without = family.run(method, 1), family.run(method, 1, tmp_path / "run", unlabelled)
    assert torch.equal(losses(without), losses(with_pids))
    expected, found = final_tensors(with_pids), final_tensors(without)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def permuted_run(family: Family, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A run on the target with other exemplar indices, each picture with its own random numbers."""
    permutation = np.random.default_rng(0).permutation(len(ShardIndex.load(str(family.target)).split("train")))
    target = permuted(family.target, folder / "permuted", permutation)
    with monkeypatch.context() as patch:
        carry_draws(patch, permutation)
        return family.run(method, 1, folder / "run", target), permutation


@pytest.mark.parametrize("method", WITH_TARGET)
def test_permuted_exemplar_indices_change_nothing(
    family: Family, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, permutation = permuted_run(family, method, tmp_path, monkeypatch)
    torch.testing.assert_close(losses(run), losses(family.run(method, 1)), rtol=1e-9, atol=0)
    expected, found = final_tensors(family.run(method, 1)), final_tensors(run)
    for key, tensor in expected.items():
        if key.startswith(("network.", "memory.rows")):  # a picture's row is where its index is
            other = found[key][torch.from_numpy(permutation)] if key == "memory.rows" else found[key]
            torch.testing.assert_close(other, tensor, rtol=0, atol=1e-9, msg=key)


def published_bank_loss(batch: GatheredBatch, positives: Tensor, num_neighbors: int = 0) -> Tensor:
    """FMCL's published column order, before its neighbours: column 0 is the positive, and the target is column y."""
    features, rows = batch._own_features_bD, batch._memory.rows
    positive = (features * positives).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, features @ rows.T], dim=1)
    return F.cross_entropy(logits / batch._memory.temperature, batch.indices_B)


def test_the_published_column_order_of_fmcl_would_be_found_out(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the positive of picture y is row y - 1, in most cases a picture of the same person, as files are sorted."""
    split = ShardIndex.load(str(family.target)).split("train")
    pids = np.asarray(split.pids)[np.argsort(split.indices)]
    assert np.mean(pids[1:] == pids[:-1]) > 0.8
    monkeypatch.setattr(GatheredBatch, "bank_loss", published_bank_loss)
    in_order = family.run("fmcl", 1, tmp_path / "in_order")
    other, _ = permuted_run(family, "fmcl", tmp_path, monkeypatch)
    target_loss = 2
    torch.testing.assert_close(losses(other)[:3], losses(in_order)[:3], rtol=1e-9, atol=0)  # on the source alone
    assert ((losses(other) - losses(in_order))[4:, target_loss].abs() > 0.01).all()
