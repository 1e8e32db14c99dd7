"""DBSCAN on a graph that is given in blocks of rows and never kept whole.

Letters: N pictures, n of them on this rank, E edges.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from ecn_dist import distributed

BYTES_PER_EDGE = 64  # at work on one


def dbscan(
    near: Callable[[slice], sparse.csr_array],
    blocks: list[slice],
    num_pictures: int,
    min_samples: int,
    memory_budget: int,
) -> np.ndarray:
    """(N,) int64 labels on every rank: clusters by their lowest core picture, -1 for outliers.

    `near` gives rows of the symmetric matrix (N, N) of near pairs, each picture near itself, in those blocks that are
    this rank's; a block's rows come again where all do not fit into `memory_budget`. Collectives: gathers of the number
    of near pictures and of at most N edges a rank.
    """
    kept: list[sparse.csr_array | None] = []
    counts, borders, free = [np.empty(0, dtype=np.int64)], [], memory_budget // 2
    for block in blocks:
        rows = near(block)
        count = np.diff(rows.indptr).astype(np.int64)
        counts.append(count)
        borders.append(_edges(rows, block.start, count < min_samples))  # fewer than min_samples each
        free -= rows.nnz * 16
        kept.append(rows if free >= 0 else None)
    core = distributed.all_gather_uneven_rows(torch.from_numpy(np.concatenate(counts))).numpy() >= min_samples

    forest, waiting = np.empty((0, 2), dtype=np.int64), []
    for block, rows in zip(blocks, kept, strict=True):
        rows = near(block) if rows is None else rows
        edges = _edges(rows, block.start, core[block])
        waiting.append(edges[core[edges[:, 1]]])
        if sum(map(len, waiting)) * BYTES_PER_EDGE > memory_budget // 2:
            forest, waiting = _forest(np.concatenate([forest, *waiting]), num_pictures), []
    forest = _forest(np.concatenate([forest, *waiting]), num_pictures)
    forest = distributed.all_gather_uneven_rows(torch.from_numpy(forest)).numpy()
    labels = np.full(num_pictures, -1, dtype=np.int64)
    labels[core] = np.unique(_lowest_joined(forest, num_pictures)[core], return_inverse=True)[1]

    border = np.concatenate([np.empty((0, 2), dtype=np.int64), *borders])
    border = border[core[border[:, 1]]]
    border = distributed.all_gather_uneven_rows(torch.from_numpy(border)).numpy()
    lowest = np.full(num_pictures, num_pictures, dtype=np.int64)
    np.minimum.at(lowest, border[:, 0], labels[border[:, 1]])
    return np.where(lowest < num_pictures, lowest, labels)


def _edges(rows: sparse.csr_array, first: int, wanted: np.ndarray) -> np.ndarray:
    """(E, 2) int64 picture numbers of the entries in the rows that are `wanted`."""
    row = np.repeat(np.arange(len(wanted)), np.diff(rows.indptr))
    taken = wanted[row]
    return np.stack([first + row[taken], rows.indices[taken]], axis=1).astype(np.int64)


def _lowest_joined(edges: np.ndarray, num_pictures: int) -> np.ndarray:
    """(N,) the lowest number in each picture's component."""
    ones = np.ones(len(edges), dtype=np.int8)
    graph = sparse.csr_array((ones, (edges[:, 0], edges[:, 1])), shape=(num_pictures, num_pictures))
    components = connected_components(graph, directed=False)[1]
    _, first, component = np.unique(components, return_index=True, return_inverse=True)
    return first[component]


def _forest(edges: np.ndarray, num_pictures: int) -> np.ndarray:
    """At most N edges (E, 2) with the same components: from a component's first picture to each other."""
    lowest = _lowest_joined(edges, num_pictures)
    joined = np.flatnonzero(lowest != np.arange(num_pictures))
    return np.stack([lowest[joined], joined], axis=1)
