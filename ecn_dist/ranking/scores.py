"""What the gallery is ranked by: a number for each pair of query and picture, the lower the better.

Shape letters: R queries of a block, n pictures of a chunk, T true matches of the query that has most, P pairs.
"""

from typing import Protocol

from torch import Tensor

from ecn_dist.ranking.distances import PairDistances


class Score(Protocol):
    """A score that rises with the distance of a pair, from a squared distance that is lowered for some pairs."""

    def of_pairs(self, queries: Tensor, pictures: Tensor) -> Tensor:
        """Exact scores (P,) float64 of query rows (P,) and gallery rows (P,) of this rank."""
        ...

    def squared_distance(self, queries: Tensor, scores: Tensor) -> Tensor:
        """(R, T) float64: the squared distances that have these scores (R, T) where nothing is lowered."""
        ...

    def lowering(self, queries: Tensor, pictures: Tensor | slice) -> Tensor | None:
        """(R, n) float64: by how much the squared distance of each pair is lowered; None: nothing is."""
        ...


class DistanceScore:
    """The Euclidean distance itself."""

    def __init__(self, distances: PairDistances) -> None:
        self._distances = distances

    def of_pairs(self, queries: Tensor, pictures: Tensor) -> Tensor:
        return self._distances(queries, pictures)

    def squared_distance(self, queries: Tensor, scores: Tensor) -> Tensor:
        return scores.square()

    def lowering(self, queries: Tensor, pictures: Tensor | slice) -> None:
        return None
