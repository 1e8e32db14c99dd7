"""Sparse k-reciprocal encodings (Zhong, Zheng, Cao, Li, CVPR 2017), for clusters and for re-ranking: never N x N.

A picture's code is a sparse row of weights on the pictures of its neighbourhood, which sum to 1. Weights are whole
multiples of 1 / GRID, so that their sums are exact in float64: the same in any order, on any number of ranks.

Letters: N pictures, K neighbours in a list, R rows of codes, M rows that they meet, P pairs of rows, E entries.
"""

import numpy as np
import torch
from scipy import sparse

from ecn_dist import distributed

GRID = 2.0**46  # sums stay exact up to 128, so that this many codes can be averaged
ROUNDING = 1e-9  # of a sum of square roots; well above what it can be off
BYTES_PER_ENTRY = 64  # at work on one


def neighbor_lists(neighbors_NK: np.ndarray, num_pictures: int, length: int | None = None) -> sparse.csr_array:
    """(rows, `num_pictures`) with 1 at the first `length` of each row's neighbours; those below 0 are none."""
    listed = neighbors_NK[:, :length]
    row, place = (listed >= 0).nonzero()
    ones = np.ones(len(row), dtype=np.int32)
    return sparse.csr_array((ones, (row, listed[row, place])), shape=(len(listed), num_pictures))


def mutual(lists: sparse.csr_array) -> sparse.csr_array:
    """1 where two pictures are in each other's lists (N, N); symmetric."""
    return lists.multiply(lists.T.tocsr()).tocsr()


def expanded(own: sparse.csr_array, half: sparse.csr_array) -> sparse.csr_array:
    """Neighbourhoods (R, N) with those of members added that are inside by more than two thirds.

    `own` are the mutual neighbours of R pictures, `half` (N, N) the mutual neighbours of all in shorter lists.
    """
    inside = (own @ half).multiply(own).tocoo()  # of each member, how much of its neighbourhood; `half` is symmetric
    size = np.diff(half.indptr)
    kept = 3 * inside.data > 2 * size[inside.col]
    ones = np.ones(int(kept.sum()), dtype=np.int32)
    taken = sparse.csr_array((ones, (inside.row[kept], inside.col[kept])), shape=own.shape)
    return (own + taken @ half).tocsr()


def codes(members: sparse.csr_array, distances: np.ndarray) -> sparse.csr_array:
    """Weights exp(-distance), scaled to sum 1: codes (R, N). `distances` (E,) are in the order of the entries."""
    rows = sparse.csr_array((np.exp(-distances), members.indices, members.indptr), shape=members.shape)
    return _on_grid(rows, rows.sum(axis=1))


def averaged(first: sparse.csr_array, all_codes: sparse.csr_array) -> sparse.csr_array:
    """The mean code (R, N) of the pictures that `first` (R, N) has for each row, of the codes (N, N) of all."""
    return _on_grid((first @ all_codes).tocsr(), np.diff(first.indptr))


def _on_grid(rows: sparse.csr_array, divisor: np.ndarray) -> sparse.csr_array:
    rows.data = np.rint(rows.data / np.repeat(divisor, np.diff(rows.indptr)) * GRID) / GRID
    return rows


def gather_rows(rows: sparse.csr_array) -> sparse.csr_array:
    """The rows of all ranks, in rank order. Collectives: three gathers, of counts, columns and values.

    On one rank they are these rows, which are not to be changed from then on.
    """
    given = (np.diff(rows.indptr).astype(np.int64), rows.indices.astype(np.int32), rows.data)
    counts, columns, values = (
        distributed.all_gather_uneven_rows(torch.from_numpy(np.ascontiguousarray(part))).numpy() for part in given
    )
    starts = np.concatenate([[0], counts.cumsum()])
    return sparse.csr_array((values, columns, starts), shape=(len(counts), rows.shape[1]))


class Overlaps:
    """Sums of the smaller weights of two codes, for pairs in which they are not small.

    The sum of min(a, b) is at most that of sqrt(a b), which is a sparse matrix product; only pairs that reach the
    bound by this are summed up exactly.
    """

    def __init__(self, all_codes: sparse.csr_array, at_least: float, memory_budget: int) -> None:
        """With `all_codes` (M, N), which are put in order of their columns; without sums of 0 or below `at_least`."""
        all_codes.sort_indices()  # for elementwise work in one pass
        self._codes, self._at_least, self._budget = all_codes, at_least, memory_budget
        self._roots = all_codes.sqrt().T.tocsr()
        self._holders = np.diff(self._roots.indptr)

    def blocks(self, rows: sparse.csr_array) -> list[slice]:
        """`rows` (R, N) in blocks that fit into the budget."""
        meetings = np.concatenate([[0], self._holders[rows.indices].cumsum()])
        return cut(np.diff(meetings[rows.indptr]), self._budget // BYTES_PER_ENTRY)

    def of(self, rows: sparse.csr_array) -> sparse.csr_array:
        """The sums (R, M) for one block of codes (R, N)."""
        likely = (rows.sqrt() @ self._roots).tocoo()
        kept = likely.data >= self._at_least - ROUNDING
        row, column = likely.row[kept], likely.col[kept]
        entries = np.diff(rows.indptr)[row] + np.diff(self._codes.indptr)[column]
        rows.sort_indices()
        sums = [
            rows[row[few]].minimum(self._codes[column[few]]).sum(axis=1)
            for few in cut(entries, self._budget // BYTES_PER_ENTRY)
        ]
        values = np.concatenate([np.empty(0), *sums])
        kept = (values >= self._at_least) & (values > 0)
        shape = (rows.shape[0], self._codes.shape[0])
        return sparse.csr_array((values[kept], (row[kept], column[kept])), shape=shape)

    def of_all(self, rows: sparse.csr_array) -> sparse.csr_array:
        """The sums (R, M) for codes (R, N), block by block."""
        parts = [self.of(rows[block]) for block in self.blocks(rows)]
        return sparse.vstack([sparse.csr_array((0, self._codes.shape[0])), *parts], format="csr")


def similarity(overlap: np.ndarray) -> np.ndarray:
    """1 - the Jaccard distance, from sums of the smaller weights."""
    return np.minimum(overlap / (2.0 - overlap), 1.0)


def values_at(rows: sparse.csr_array, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(P,) the values of single places (P,); 0 where there is no entry."""
    if not len(row):
        return np.empty(0)
    rows.sort_indices()  # to be searched, not scanned
    return np.asarray(rows[row.copy(), column.copy()]).reshape(-1)  # scipy wants arrays that own their memory


def cut(costs: np.ndarray, limit: int) -> list[slice]:
    """Consecutive parts of at most `limit` in sum, or of one."""
    ends, parts, start = costs.cumsum(), [], 0
    while start < len(costs):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + limit, side="right")))
        parts.append(slice(start, stop))
        start = stop
    return parts
