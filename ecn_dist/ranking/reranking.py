"""k-reciprocal re-ranking (Zhong, Zheng, Cao, Li, CVPR 2017) on sparse neighbour lists: never N x N, never Q x G.

Every picture, query or gallery, is encoded as a sparse vector of weights on the pictures of its k-reciprocal
neighbourhood. The Jaccard distance of two such vectors needs only the entries that both have; where they share none
it is 1. So the new distance is the old one for nearly all pairs, shifted, and the ranking can be counted like a
ranking by distance, with few pairs lowered.

Shape letters: N pictures, queries first, then gallery; Q queries, G gallery pictures; R pictures of a block, K = k1 + 1
neighbours (the picture itself among them), n pictures of a chunk, P pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking import reciprocal
from ecn_dist.ranking.distances import PairDistances, full_precision
from ecn_dist.ranking.inputs import check_features, own_share
from ecn_dist.ranking.neighbors import MEMORY_BUDGET, NeighborSearch


@dataclass(frozen=True)
class KReciprocal:
    """Settings of the re-ranking; the defaults are the paper's.

    k1: nearest neighbours that must be mutual; k2: nearest neighbours whose encodings are averaged (1: none);
    distance_weight: lambda, the share of the original distance in the result, above 0.
    """

    k1: int = 20
    k2: int = 6
    distance_weight: float = 0.3

    def __post_init__(self) -> None:
        if self.k1 < 1 or not 1 <= self.k2 <= self.k1 + 1 or not 0 < self.distance_weight <= 1:
            raise UserError(
                f"re-ranking with k1 {self.k1}, k2 {self.k2}, distance_weight {self.distance_weight}: "
                "k1 must be at least 1, k2 between 1 and k1 + 1, distance_weight above 0 and at most 1"
            )


class Encodings:
    """The encodings of all pictures, and the farthest squared distance from each; the same on every rank."""

    def __init__(
        self, query_features: Tensor, gallery_features: Tensor, settings: KReciprocal, device: torch.device, budget: int
    ) -> None:
        """From whole features, the same on every rank. Collectives: gathers of neighbour lists and encodings."""
        features = torch.cat([query_features.to(gallery_features.device), gallery_features])
        self.num_queries, self.settings, self._budget = len(query_features), settings, budget
        num_pictures, own = len(features), own_share(len(features))
        search = NeighborSearch(features, features, settings.k1 + 1, device, budget)
        queries = torch.arange(own.start, own.stop, device=device)
        _, neighbors, farthest = search.of(queries)
        neighbors_NK = distributed.all_gather_uneven_rows(neighbors).cpu().numpy()
        farthest = distributed.all_gather_uneven_rows(search.distances(queries, farthest)).square()
        self.farthest = torch.where(farthest > 0, farthest, 1.0)  # of pictures all alike

        half = reciprocal.mutual(reciprocal.neighbor_lists(neighbors_NK, num_pictures, round(settings.k1 / 2) + 1))
        mutual = reciprocal.mutual(reciprocal.neighbor_lists(neighbors_NK, num_pictures))
        members = reciprocal.expanded(mutual[own], half)
        row = torch.from_numpy(own.start + np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))).to(device)
        squared = search.distances(row, torch.from_numpy(members.indices).to(row)).square() / self.farthest[row]
        self.codes = reciprocal.gather_rows(reciprocal.codes(members, squared.cpu().numpy()))
        if settings.k2 > 1:  # of equal pictures, another may be the first
            first = reciprocal.neighbor_lists(neighbors_NK[own], num_pictures, settings.k2)
            self.codes = reciprocal.gather_rows(reciprocal.averaged(first, self.codes))

    def similarities(self, pictures: slice) -> sparse.csr_array:
        """1 - the Jaccard distance, where it is not 0, of all queries and these gallery places: (Q, n) float64."""
        gallery = self.codes[self.num_queries + pictures.start : self.num_queries + pictures.stop]
        overlaps, queries = reciprocal.Overlaps(gallery, 0.0, self._budget), self.codes[: self.num_queries]
        found = sparse.vstack([overlaps.of(queries[block]) for block in overlaps.blocks(queries)], format="csr")
        found.data = reciprocal.similarity(found.data)
        return found


class RerankedScore(PairDistances):
    """The re-ranked distance: (1 - lambda) Jaccard distance + lambda squared distance / the farthest from the query."""

    def __init__(self, encodings: Encodings, query: Tensor, gallery: Tensor, device: torch.device, first: int) -> None:
        """`first` is the place in the whole gallery of the first of the pictures of `gallery`."""
        super().__init__(query, gallery, device)
        self._farthest, self._weight = encodings.farthest, encodings.settings.distance_weight
        self._similarities = encodings.similarities(slice(first, first + len(gallery)))

    def of_pairs(self, queries: Tensor, pictures: Tensor) -> Tensor:
        squared = self(queries, pictures).square() / self._farthest[queries]
        similarities = reciprocal.values_at(self._similarities, queries.cpu().numpy(), pictures.cpu().numpy())
        return (1 - self._weight) * (1 - torch.from_numpy(similarities).to(squared)) + self._weight * squared

    def squared_distance(self, queries: Tensor, scores: Tensor) -> Tensor:
        return (scores - (1 - self._weight)) / self._weight * self._farthest[queries, None]

    def lowering(self, queries: Tensor, pictures: Tensor) -> Tensor:
        rows = self._similarities[queries.cpu().numpy()][:, pictures.cpu().numpy()].toarray()
        saved = torch.from_numpy(rows).to(queries.device)
        return saved * ((1 - self._weight) / self._weight * self._farthest[queries, None])


def rerank_distances(
    query_features: Tensor,
    gallery_features: Tensor,
    settings: KReciprocal | None = None,
    *,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """The whole table (Q, G) float32 of re-ranked distances, for galleries for which it fits into memory.

    Features are (Q, D) and (G, D) floats, the same on every rank; the work of the encoding is shared. For the metrics
    of large galleries `evaluate_ranking` takes the settings and makes no such table. Collectives: see `Encodings`.
    """
    device = torch.device(device) if device is not None else torch.as_tensor(gallery_features).device
    with full_precision(device):
        check_features(query_features, gallery_features, gallery_sharded=False)
        query, gallery = torch.as_tensor(query_features).detach(), torch.as_tensor(gallery_features).detach()
        encodings = Encodings(query, gallery, settings or KReciprocal(), device, memory_budget)
        score, pictures = RerankedScore(encodings, query, gallery, device, 0), torch.arange(len(gallery), device=device)
        rows = [score.of_pairs(torch.full_like(pictures, row), pictures).float() for row in range(len(query))]
        return torch.stack(rows)
