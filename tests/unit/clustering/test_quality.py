"""Figures on clusters against scikit-learn and plain counting."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from ecn_dist.clustering.quality import adjusted_mutual_information, cross_camera_share


@pytest.mark.parametrize("seed", range(20))
def test_ami_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 300))
    pids = rng.integers(0, rng.integers(1, n + 1), n)
    labels = np.where(rng.random(n) < rng.random(), pids, rng.integers(0, rng.integers(1, n + 1), n))
    expected = adjusted_mutual_info_score(pids, labels)
    assert adjusted_mutual_information(labels, pids) == pytest.approx(expected, abs=1e-9)


def test_ami_of_partitions_without_information() -> None:
    for labels, pids in (([0, 0, 0], [1, 1, 1]), ([0, 1, 2], [5, 6, 7]), ([], []), ([0, 1, 2], [4, 4, 4])):
        ours = adjusted_mutual_information(np.array(labels, dtype=int), np.array(pids, dtype=int))
        assert ours == pytest.approx(adjusted_mutual_info_score(pids, labels))


def test_cross_camera_share_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    labels, camids = rng.integers(0, 5, 60), rng.integers(0, 3, 60)
    pairs = [(i, j) for i, j in itertools.permutations(range(60), 2) if labels[i] == labels[j]]
    expected = sum(camids[i] != camids[j] for i, j in pairs) / len(pairs)
    assert cross_camera_share(labels, camids) == pytest.approx(expected)
    assert cross_camera_share(np.arange(4), np.zeros(4, dtype=int)) == 0.0
    assert cross_camera_share(np.array([], dtype=int), np.array([], dtype=int)) == 0.0
