"""The clustering benchmark on a small case: its dense version finds what is measured."""

import json

import torch

from benchmarks import clustering as bench
from ecn_dist.clustering import find_clusters


def test_dense_version_finds_the_same() -> None:
    features, camids = bench.make_features(200, 24, noise=0.5)
    assert len(camids) == 200
    labels = torch.from_numpy(bench.dense_clusters(features, k1=12, k2=3))
    assert torch.equal(labels, find_clusters(features, k1=12, k2=3).labels)


def test_results_and_table(tmp_path) -> None:
    options = ["--dim", "16", "--rounds", "1", "--camera_aware", "--output", str(tmp_path), "--machine", "here"]
    assert bench.main(["--pictures", "100", "150", *options]) == 0
    results = json.loads((tmp_path / "clustering-here.json").read_text())["results"]
    assert [row["N"] for row in results] == [100, 150]
    assert all(row["dense s"] > 0 and row["ranks"] == 1 for row in results)
    assert "above features MiB" in (tmp_path / "clustering-here.md").read_text()
