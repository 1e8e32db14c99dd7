"""The parts of sparse codes that the tests of clusters and re-ranking do not single out."""

import numpy as np
from scipy import sparse

from ecn_dist.ranking import reciprocal


def random_codes(seed: int, rows: int, columns: int) -> sparse.csr_array:
    random = np.random.default_rng(seed)
    weights = np.where(random.random((rows, columns)) < 0.1, random.random((rows, columns)), 0.0)
    return sparse.csr_array(weights / np.maximum(weights.sum(1, keepdims=True), 1e-9))


def test_overlaps_in_blocks_and_above_a_bound() -> None:
    left, right = random_codes(0, 30, 90), random_codes(1, 50, 90)
    expected = np.minimum(left.toarray()[:, None], right.toarray()[None]).sum(2)
    for at_least in (0.0, 0.1, 0.3):
        for budget in (300, 10_000, 2**28):
            overlaps = reciprocal.Overlaps(right, at_least, budget)
            found = sparse.vstack([overlaps.of(left[block]) for block in overlaps.blocks(left)]).toarray()
            np.testing.assert_allclose(found, np.where(expected >= at_least, expected, 0.0), atol=1e-14)


def test_parts_are_within_the_limit_or_single() -> None:
    costs = np.array([3, 9, 1, 1, 1, 0, 4, 20, 1])
    assert [list(costs[part]) for part in reciprocal.cut(costs, 5)] == [[3], [9], [1, 1, 1, 0], [4], [20], [1]]
    assert reciprocal.cut(costs[:0], 5) == []


def test_values_at_single_places() -> None:
    codes = random_codes(2, 20, 30)
    row, column = np.indices(codes.shape).reshape(2, -1)
    np.testing.assert_array_equal(reciprocal.values_at(codes, row, column), codes.toarray().ravel())
    assert len(reciprocal.values_at(codes, row[:0], column[:0])) == 0
