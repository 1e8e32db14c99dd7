"""What never reaches a loss on the target: its identities, and the order of its files."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ecn_dist.data import ShardIndex
from ecn_dist.data.draws import Draws
from ecn_dist.train import main as train
from tests.integration.conftest import REPOSITORY, Domains
from tests.integration.training import SHORT, SMALL_INPUT, THIN, final_tensors, loss_lines, train_on


def changed(shards: Path, folder: Path, change: Callable[[np.ndarray, dict], None]) -> Path:
    """A copy of a shard folder in which `change` altered the training members and what the index says of them."""
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    split = index["splits"]["train"]
    sidecar = folder / split["members"]["name"]
    members = np.load(sidecar)
    change(members, split)
    np.save(sidecar, members)
    split["members"] |= {"bytes": sidecar.stat().st_size, "sha256": hashlib.sha256(sidecar.read_bytes()).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def without_identities(shards: Path, folder: Path) -> Path:
    """A copy of a shard folder whose training pictures have no pids."""

    def remove(members: np.ndarray, split: dict) -> None:
        assert len(set(members["pid"])) > 1
        members["pid"] = -1
        split["identities"] = []

    return changed(shards, folder, remove)


def permuted(shards: Path, folder: Path, permutation: np.ndarray) -> Path:
    """A copy of a shard folder in which training picture i has the exemplar index `permutation[i]`."""

    def permute(members: np.ndarray, split: dict) -> None:
        members["index"] = permutation[members["index"]]

    return changed(shards, folder, permute)


def carry_draws(monkeypatch: pytest.MonkeyPatch, permutation: np.ndarray) -> None:
    """Random numbers are addressed by the exemplar index: carry them along, so that each picture keeps its own."""
    before = np.argsort(permutation)
    make, words = Draws.__init__, Draws._words

    def making(self: Draws, seed: int, domain: str, purpose: str) -> None:
        make(self, seed, domain, purpose)
        self.by_index = domain == "target" and purpose in ("augmentation", "erasing", "instances")

    def carried(self: Draws, count: int, address: tuple) -> np.ndarray:
        first, second, third = address
        return words(self, count, (first, before[second] if self.by_index else second, third))

    monkeypatch.setattr(Draws, "__init__", making)
    monkeypatch.setattr(Draws, "_words", carried)


@pytest.mark.timeout(400)
def test_removing_the_pids_changes_no_parameter(ranks, small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT, *THIN]
    unlabelled = ["--target", str(without_identities(small_domains.target, tmp_path / "unlabelled"))]
    assert train_on(ranks, 2, [*options, "--output_dir", str(tmp_path / "with")]) == {0}
    assert train_on(ranks, 2, [*options, *unlabelled, "--output_dir", str(tmp_path / "without")]) == {0}

    labelled_lines, lines = loss_lines(tmp_path / "with"), loss_lines(tmp_path / "without")
    assert any(line.get("memory_neighbor_precision") is not None for line in labelled_lines)
    assert not any(line.get("memory_neighbor_precision") is not None for line in lines)
    assert [line["loss"] for line in lines] == [line["loss"] for line in labelled_lines]
    labelled_tensors, tensors = final_tensors(tmp_path / "with"), final_tensors(tmp_path / "without")
    assert tensors.keys() == labelled_tensors.keys()
    for key in tensors:
        assert torch.equal(tensors[key], labelled_tensors[key]), key


CLUSTER = [
    *("--config", str(REPOSITORY / "configs" / "demo_cluster.yaml"), "--global_batch_size", "24", "--epochs", "2"),
    *("--optim.source_only_epochs", "1", "--cluster.steps_per_epoch", "10", "--cluster.camera_weight", "0.5"),
    *("--cluster.eps", "0.4", "--cluster.min_samples", "2"),
    *("--logging.every_steps", "1", "--logging.tensorboard", "false", "--logging.figures", "false"),
    *SMALL_INPUT,
    *THIN,
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", ["ecn", "cluster"])
def test_permuted_exemplar_indices_change_nothing(
    small_domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A published method of this family owes 20 mAP to file names sorted by identity; none here may."""
    places = small_domains.options[2:]
    options = [*small_domains.options, *SHORT, *THIN] if method == "ecn" else [*CLUSTER, *places]
    options += ["--precision", "fp64"]
    size = len(ShardIndex.load(str(small_domains.target)).split("train"))
    permutation = np.random.default_rng(0).permutation(size)
    target = permuted(small_domains.target, tmp_path / "permuted", permutation)
    assert train([*options, "--output_dir", str(tmp_path / "sorted")]) == 0
    carry_draws(monkeypatch, permutation)
    assert train([*options, "--target", str(target), "--output_dir", str(tmp_path / "other")]) == 0

    expected, found = (
        torch.tensor([line["loss"] for line in loss_lines(tmp_path / run) if "loss" in line], dtype=torch.float64)
        for run in ("sorted", "other")
    )
    assert len(expected) >= 8
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    tensors, others = final_tensors(tmp_path / "sorted"), final_tensors(tmp_path / "other")
    assert not torch.equal(torch.from_numpy(permutation), torch.arange(size))
    if method == "ecn":  # a picture's row is where its index is
        others["memory.rows"] = others["memory.rows"][torch.from_numpy(permutation)]
    else:
        others["cluster.labels"] = others["cluster.labels"][torch.from_numpy(permutation)]
    for key, tensor in tensors.items():
        if key.startswith(("network.", "memory.rows", "cluster.labels")):
            torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-7, msg=key)
