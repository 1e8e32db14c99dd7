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
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking import reciprocal
from ecn_dist.ranking.distances import PairDistances
from ecn_dist.ranking.inputs import own_share
from ecn_dist.ranking.neighbors import NeighborSearch


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


class RerankedScore(PairDistances):
    """The re-ranked distance: (1 - lambda) Jaccard distance + lambda squared distance / the farthest from the query."""

    def __init__(
        self, query: Tensor, gallery: Tensor, part: slice, settings: KReciprocal, device: torch.device, budget: int
    ) -> None:
        """Of the queries and a `part` of the gallery, both given whole on every rank.

        Collectives: gathers of neighbour lists and encodings.
        """
        super().__init__(query, gallery[part], device)
        features = torch.cat([query.to(gallery.device), gallery])
        num_pictures, own = len(features), own_share(len(features))
        search = NeighborSearch(features, features, settings.k1 + 1, device, budget)
        pictures = torch.arange(own.start, own.stop, device=device)
        _, neighbors, farthest = search.of(pictures)
        neighbors_NK = distributed.all_gather_uneven_rows(neighbors).cpu().numpy()
        farthest = distributed.all_gather_uneven_rows(search.distances(pictures, farthest)).square()
        self._farthest = torch.where(farthest > 0, farthest, 1.0)  # of pictures all alike
        self._weight = settings.distance_weight

        half = reciprocal.mutual(reciprocal.neighbor_lists(neighbors_NK, num_pictures, round(settings.k1 / 2) + 1))
        mutual = reciprocal.mutual(reciprocal.neighbor_lists(neighbors_NK, num_pictures))
        members = reciprocal.expanded(mutual[own], half)
        row = torch.from_numpy(own.start + np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))).to(device)
        squared = search.distances(row, torch.from_numpy(members.indices).to(row)).square() / self._farthest[row]
        codes = reciprocal.gather_rows(reciprocal.codes(members, squared.cpu().numpy()))
        if settings.k2 > 1:  # of equal pictures, another may be the first
            nearest = reciprocal.neighbor_lists(neighbors_NK[own], num_pictures, settings.k2)
            codes = reciprocal.gather_rows(reciprocal.averaged(nearest, codes))
        # 1 - the Jaccard distance of queries and pictures, where it is not 0.
        of_query, of_part = codes[: len(query)], codes[len(query) + part.start : len(query) + part.stop]
        self._similarities = reciprocal.Overlaps(of_part, 0.0, budget).of_all(of_query)
        self._similarities.data = reciprocal.similarity(self._similarities.data)

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
