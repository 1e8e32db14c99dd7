"""The identities of the target are for diagnostics alone: training without them gives the very same parameters."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.conftest import Domains
from tests.integration.training import SHORT, final_tensors, loss_lines, train_on


def without_identities(shards: Path, folder: Path) -> Path:
    """A copy of a shard folder whose training pictures have no pids."""
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    split = index["splits"]["train"]
    sidecar = folder / split["members"]["name"]
    members = np.load(sidecar)
    assert len(set(members["pid"])) > 1
    members["pid"] = -1
    np.save(sidecar, members)
    split["members"] |= {"bytes": sidecar.stat().st_size, "sha256": hashlib.sha256(sidecar.read_bytes()).hexdigest()}
    split["identities"] = []
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.timeout(400)
def test_removing_the_pids_changes_no_parameter(ranks, small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT]
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
