"""Pseudo-labels: DBSCAN on the Jaccard distances of k-reciprocal neighbourhoods, as SpCL and Cluster-Contrast have it.

Also with camera-aware neighbourhoods (CA-Jaccard, CVPR 2024). Exact, sparse, divided among the ranks.

Letters: N pictures, n of them on this rank, D feature length, C clusters.
"""

from dataclasses import dataclass

import torch
from scipy import sparse
from torch import Tensor

from ecn_dist.clustering.codes import make_codes
from ecn_dist.clustering.density import dbscan
from ecn_dist.clustering.neighbors import Ranking
from ecn_dist.errors import UserError
from ecn_dist.ranking import reciprocal
from ecn_dist.ranking.distances import MEMORY_BUDGET

MARGIN = 1e-7  # on eps: as means of a few codes give round numbers, Jaccard distances often fall on it


@dataclass(frozen=True)
class Clusters:
    """Which cluster each picture is in."""

    labels: Tensor  # (N,) int64 on the CPU: 0..C-1, by the lowest core picture; -1: an outlier


def find_clusters(
    features: Tensor,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    min_samples: int = 4,
    camids: Tensor | None = None,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 2,
    k2_inter: int = 4,
    sharded: bool = False,
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> Clusters:
    """Clusters of pictures by their features, the same on any number of ranks.

    Args:
        features: (N, D) floats of unit length, the same on all ranks; with `sharded` each rank's part, in rank order.
            Products and distances are computed on their device, codes and graph on the CPU.
        k1: nearest pictures, the picture itself among them, of which the mutual ones make the neighbourhood.
        k2: nearest pictures, the picture itself among them, whose codes are averaged; at most k1.
        eps: Jaccard distance up to which pictures are near; above 0 and below 1.
        min_samples: near pictures, the picture itself among them, that make a core picture.
        camids: (N,) integers of all pictures, on every rank. Given, neighbourhoods are camera-aware: k1 and k2 have no
            part in them, and the following four have.
        k1_intra: nearest pictures of the picture's camera, beside itself.
        k1_inter: nearest pictures of the other cameras.
        k2_intra: of the picture's camera, itself among them, how many are averaged; at most k1_intra + 1.
        k2_inter: of the other cameras, how many are averaged; at most k1_inter.
        sharded: the features are in parts and stay so: they are sent round, a chunk at a time.
        memory_budget: bytes for blocks of products and of the graph; neighbour lists and codes come on top.

    Raises:
        UserError: on all ranks, if an argument is out of range, or features are not of unit length on any.

    Collective: gathers of neighbour lists, codes, counts and at most N edges a rank; of features if `sharded`.
    """
    if not 0 < eps < 1:
        raise UserError(f"eps {eps} must be above 0 and below 1", on_all_ranks=True)
    if min_samples < 1:
        raise UserError(f"min_samples {min_samples} must be at least 1", on_all_ranks=True)
    rankings = _rankings(k1, k2, camids, k1_intra, k1_inter, k2_intra, k2_inter)
    codes, own = make_codes(features, rankings, camids, sharded, memory_budget)
    jaccard = min(eps + MARGIN, 1.0)
    overlaps = reciprocal.Overlaps(codes, 2 * (1 - jaccard) / (2 - jaccard), memory_budget // 2)
    blocks = [slice(own.start + block.start, own.start + block.stop) for block in overlaps.blocks(codes[own])]
    labels = dbscan(lambda block: overlaps.of(codes[block]), blocks, codes.shape[0], min_samples, memory_budget // 2)
    return Clusters(torch.from_numpy(labels))


def jaccard_similarities(
    features: Tensor,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    min_samples: int = 4,
    camids: Tensor | None = None,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 2,
    k2_inter: int = 4,
    sharded: bool = False,
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> sparse.csr_array:
    """1 less the Jaccard distance, where it is not 0: (N, N) float64 on every rank. For tests and small N.

    Takes what `find_clusters` takes; `eps` and `min_samples` have no part in it. Collective: as there.
    """
    rankings = _rankings(k1, k2, camids, k1_intra, k1_inter, k2_intra, k2_inter)
    codes, own = make_codes(features, rankings, camids, sharded, memory_budget)
    rows = reciprocal.Overlaps(codes, 0.0, memory_budget).of_all(codes[own])
    rows.data = reciprocal.similarity(rows.data)
    return reciprocal.gather_rows(rows)


def _rankings(
    k1: int, k2: int, camids: Tensor | None, k1_intra: int, k1_inter: int, k2_intra: int, k2_inter: int
) -> list[Ranking]:
    if camids is None:
        _check_range("", k1, k2, 1, k1)
        return [Ranking(k1, k2)]
    _check_range("_intra", k1_intra, k2_intra, 1, k1_intra + 1)
    _check_range("_inter", k1_inter, k2_inter, 0, k1_inter)
    return [Ranking(k1_intra + 1, k2_intra, "same"), Ranking(k1_inter, k2_inter, "others")]


def _check_range(kind: str, k1: int, k2: int, least: int, most: int) -> None:
    if k1 < 1 or not least <= k2 <= most:
        rule = f"k1{kind} must be at least 1, k2{kind} {least} to {most}"
        raise UserError(f"k1{kind} {k1}, k2{kind} {k2}: {rule}", on_all_ranks=True)
