"""Who matches whom: pairs of one identity found without a Q x G table.

Shape letters: Q queries, R queries of a block, G gallery pictures on this rank, P pairs, T true matches of the query
that has most (the others are padded).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.ranking.inputs import NumberedLabels
from ecn_dist.ranking.scores import Score


class Labels:
    """Who is who among the queries and this rank's gallery."""

    def __init__(self, labels: NumberedLabels) -> None:
        self.query_pids, self.query_cameras = labels.query_pids, labels.query_cameras
        self.gallery_pids, self.gallery_cameras = labels.gallery_pids, labels.gallery_cameras
        self._sorted_pids, self._order = torch.sort(labels.gallery_pids, stable=True)

    def count_true(self) -> Tensor:
        """(Q,) gallery pictures on all ranks with the query's pid and another camera. Collective."""
        # One key for each pair of pid and camera, so that the junk is counted by a search as well.
        known, pids = torch.unique(torch.cat([self.query_pids, self.gallery_pids]), return_inverse=True)
        cameras = torch.cat([self.query_cameras, self.gallery_cameras])
        keys = cameras * len(known) + pids
        num_queries = len(self.query_pids)
        same = _count_equal(pids[num_queries:], pids[:num_queries])
        return distributed.all_reduce(same - _count_equal(keys[num_queries:], keys[:num_queries]))

    def count_different(self) -> Tensor:
        """(Q,) gallery pictures on all ranks with another pid than the query's. Collective."""
        return distributed.all_reduce(len(self.gallery_pids) - _count_equal(self.gallery_pids, self.query_pids))

    def same_pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of one identity: places in `queries` (P,) ascending, and gallery rows of this rank (P,)."""
        pids = self.query_pids[queries]
        first = torch.searchsorted(self._sorted_pids, pids)
        count = torch.searchsorted(self._sorted_pids, pids, right=True) - first
        places = torch.repeat_interleave(count)
        within = torch.arange(len(places), device=places.device) - (count.cumsum(0) - count)[places]
        return places, self._order[first[places] + within]


def _count_equal(values: Tensor, wanted: Tensor) -> Tensor:
    values = values.sort().values
    return torch.searchsorted(values, wanted, right=True) - torch.searchsorted(values, wanted)


@dataclass(frozen=True)
class TrueMatches:
    """The true matches of a block of queries, from all ranks, in ranked order: by score, equals in gallery order."""

    score: Tensor  # (R, T) float64, infinite where a query has fewer than T
    position: Tensor  # (R, T) int64, place in the whole gallery
    camera: Tensor  # (R, T) int64
    count: Tensor  # (R,) int64

    @property
    def valid(self) -> Tensor:
        """(R, T) bool: not padding."""
        return torch.arange(self.score.shape[1], device=self.count.device) < self.count[:, None]


def gather_true_matches(
    labels: Labels, queries: Tensor, pairs: tuple[Tensor, Tensor], score: Score, first_position: int
) -> TrueMatches:
    """Score the true ones among this rank's `pairs` of one identity, and share them. Two all-gathers of the pairs.

    `first_position` is the place of this rank's first picture in the whole gallery.
    """
    places, pictures = pairs
    true = labels.gallery_cameras[pictures] != labels.query_cameras[queries[places]]
    places, pictures = places[true], pictures[true]
    scores = distributed.all_gather_uneven_rows(score.of_pairs(queries[places], pictures))
    facts = torch.stack([places, first_position + pictures, labels.gallery_cameras[pictures]], dim=1)
    facts = distributed.all_gather_uneven_rows(facts)
    order = facts[:, 1].argsort()
    for key in (scores, facts[:, 0]):
        order = order[key[order].argsort(stable=True)]
    place, position, camera = facts[order].unbind(1)

    count = torch.bincount(place, minlength=len(queries))
    column = torch.arange(len(place), device=place.device) - (count.cumsum(0) - count)[place]
    shape = (len(queries), int(count.max()))

    def padded(values: Tensor, padding: float) -> Tensor:
        table = values.new_full(shape, padding)
        table[place, column] = values
        return table

    return TrueMatches(padded(scores[order], float("inf")), padded(position, 0), padded(camera, 0), count)
