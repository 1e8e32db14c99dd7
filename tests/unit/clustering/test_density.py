"""DBSCAN on sparse graphs against scikit-learn."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.cluster import DBSCAN

from ecn_dist.clustering.density import dbscan


@pytest.mark.parametrize("budget", [100, 2**28])
def test_labels_are_those_of_scikit_learn(budget: int) -> None:
    for seed in range(60):
        random = np.random.default_rng(seed)
        size, min_samples = int(random.integers(1, 40)), int(random.integers(1, 6))
        near = random.random((size, size)) < random.choice([0.02, 0.05, 0.1])
        near = near | near.T | np.eye(size, dtype=bool)
        graph = sparse.csr_array(near.astype(float))
        blocks = [slice(start, min(start + 7, size)) for start in range(0, size, 7)]
        found = dbscan(lambda block, graph=graph: graph[block], blocks, size, min_samples, budget)
        expected = DBSCAN(eps=0.5, min_samples=min_samples, metric="precomputed").fit_predict(1.0 - near)
        np.testing.assert_array_equal(found, expected, err_msg=f"case {seed}")
