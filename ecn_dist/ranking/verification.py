"""Verification figures: how many true pairs one threshold accepts that accepts few false ones.

Over all pairs of a query and a gallery picture (junk apart). The closest false pairs are kept while the products go
by; nothing else of the false pairs is.

Shape letters: R queries of a block, n pictures of a chunk, P pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.ranking.counting import MARGIN, Buckets
from ecn_dist.ranking.distances import PairDistances


class ClosestFalsePairs:
    """The `num_kept` closest false pairs of this rank, by the product's distances; about 60 bytes for each."""

    def __init__(self, num_kept: int, num_pictures: int, device: torch.device) -> None:
        # Some more than needed, so that the product's error cannot push out one that belongs here.
        self._capacity = num_kept + max(1024, num_kept // 16)
        self._num_pictures = num_pictures
        self._threshold = float("inf")
        self._squared = torch.empty(0, dtype=torch.float64, device=device)
        self._pairs = torch.empty(0, dtype=torch.int64, device=device)  # query row * num_pictures + gallery row
        self._slice = 2**19 if device.type == "cpu" else 2**25  # entries at a time: at first nearly all are taken

    def watch(self, line: Tensor, lines: Buckets, pictures: Tensor | slice, queries: Tensor) -> None:
        """Take the close ones of a product (R, n) of places on `lines`; infinite places are not pairs."""
        width = line.shape[1]
        step = max(1, self._slice // width)
        for start in range(0, len(line), step):
            part = slice(start, start + step)
            scale, origin, places = lines.scale[part], lines.origin[part], line[part]
            limit = (MARGIN + scale * (self._threshold - origin)).float()
            found = (places < limit[:, None]).flatten().nonzero().squeeze(1)
            row = found // width
            column = found - row * width
            squared = (places.flatten()[found].double() - MARGIN) / scale[row] + origin[row]
            picture = column + pictures.start if isinstance(pictures, slice) else pictures[column]
            self._squared = torch.cat([self._squared, squared])
            self._pairs = torch.cat([self._pairs, queries[part][row] * self._num_pictures + picture])
            if len(self._squared) > 2 * self._capacity:
                self._squared, kept = self._squared.topk(self._capacity, largest=False, sorted=False)
                self._pairs = self._pairs[kept]
                self._threshold = float(self._squared.max())

    def first_beyond(self, num_accepted: int, distances: PairDistances, error: float) -> float:
        """The distance of the first false pair beyond the `num_accepted` closest of all ranks; exact.

        `error` bounds that of the product. Collectives: all-gathers of at most the pairs kept.
        """
        squared = distributed.all_gather_uneven_rows(self._squared)
        if num_accepted >= len(squared):
            return float("inf")
        pivot = squared.sort().values[num_accepted]
        pairs = self._pairs[(self._squared - pivot).abs() <= 2 * error]
        exact = distances(pairs // self._num_pictures, pairs % self._num_pictures)
        exact = distributed.all_gather_uneven_rows(exact).sort().values
        surely_closer = int((squared - pivot < -2 * error).sum())
        return float(exact[num_accepted - surely_closer])


def num_accepted(rate: float, num_false: int) -> int:
    """How many of `num_false` false pairs a false positive rate of at most `rate` accepts."""
    return int(rate * num_false * (1 + 1e-12))


def true_positive_rates(
    rates: Sequence[float],
    closest: ClosestFalsePairs,
    num_false: int,
    true_distances: Tensor,
    distances: PairDistances,
    error: float,
) -> dict[float, float]:
    """For each false positive rate, the largest share of `true_distances` (P,) that a threshold of such a rate accepts.

    The points of scikit-learn's `roc_curve`, without interpolation. Collective.
    """
    limits = {rate: closest.first_beyond(num_accepted(rate, num_false), distances, error) for rate in rates}
    return {rate: float((true_distances < limit).double().mean()) for rate, limit in limits.items()}
