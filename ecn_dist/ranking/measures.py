"""From counts of closer pictures to figures: areas under the precision-recall curve, ranks, mINP; verification rates.

Shape letters: R queries of a block, T true matches of the query that has most, L recall levels, n pictures of a chunk,
P pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ecn_dist import distributed
from ecn_dist.ranking.counting import MARGIN, Buckets, TrueMatches
from ecn_dist.ranking.distances import BATCH, PairDistances


def measure(matches: TrueMatches, counts: Tensor, num_levels: int = 2) -> tuple[Tensor, Tensor]:
    """The figures of a ranking, from the pictures before each true match: `counts` (3, R, T) of `CloserCounter`.

    Between the points of two true matches recall stands still while precision falls: the trapezoid that ends at a true
    match begins at the precision just before it. The curve begins at precision 1 if the first picture is true, else 0.

    Returns of each query (4, R) float64, NaN where it has no true match: the area by the trapezoid rule (scikit-learn's
    precision_recall_curve and auc); that by steps (its average_precision_score); the true matches over the rank of the
    last one (Ye et al., TPAMI 2021); the rank of the first one, from 1. And (R, L) the highest precision at each of
    `num_levels` recall levels or beyond.
    """
    strictly, or_equal, in_order = counts.double().unbind(0)
    valid, score, count, none = matches.valid, matches.score, matches.count.double(), matches.count == 0
    rows, width = score.shape
    if width == 0:
        return score.new_full((4, rows), torch.nan), score.new_full((rows, num_levels), torch.nan)
    column = torch.arange(width, device=score.device)
    step = score[:, 1:] != score[:, :-1]
    # True matches at one distance are one point of the curve, which stands at the last of them.
    point = valid & (pad(step, (0, 1), value=True) | (column == matches.count[:, None] - 1))
    before = torch.where(pad(step, (1, 0), value=True), column, 0).cummax(1).values.double()
    found = column.double() + 1
    at = found / (found + or_equal)
    just_before = torch.where(before + strictly > 0, before / (before + strictly), 1.0)
    gain = torch.where(point, (found - before) / count[:, None], 0.0)
    at = torch.where(point, at, 0.0)
    last = (matches.count - 1).clamp_min(0)[:, None]
    inverse_penalty = count / (count + in_order.gather(1, last).squeeze(1))
    figures = [(gain * (at + just_before) / 2).sum(1), (gain * at).sum(1), inverse_penalty, in_order[:, 0] + 1]

    levels = torch.linspace(0, 1, num_levels, dtype=torch.float64, device=score.device)
    needed = (levels * count[:, None] - 1e-9).ceil().long().clamp_min(1) - 1
    best = at.flip(1).cummax(1).values.flip(1).gather(1, needed.clamp_max(width - 1))
    return torch.stack(figures).masked_fill(none, torch.nan), best.masked_fill(none[:, None], torch.nan)


class Verification:
    """True positive rates at false positive rates, over all pairs but junk. The points of scikit-learn's `roc_curve`.

    Keeps the closest false pairs of this rank, by the products that go by: 60 bytes for each that the largest rate
    accepts. `true_distances` are those of all true pairs, (P,) each.
    """

    def __init__(self, rates: Sequence[float], num_false: int, num_pictures: int, device: torch.device) -> None:
        """At least one of `rates`; of `num_false` pairs on all ranks, with `num_pictures` on this one."""
        self._num_accepted = {rate: int(rate * num_false * (1 + 1e-12)) for rate in rates}
        num_kept = max(self._num_accepted.values()) + 1
        # Some more than needed, so that the product's error cannot push out one that belongs here.
        self._capacity, self._threshold = num_kept + max(1024, num_kept // 16), float("inf")
        self._num_false, self._num_pictures = num_false, num_pictures
        self._squared = torch.empty(0, dtype=torch.float64, device=device)
        self._pairs = torch.empty(0, dtype=torch.int64, device=device)  # query row * num_pictures + gallery row
        self.true_distances: list[Tensor] = []

    def watch(self, line: Tensor, lines: Buckets, pictures: Tensor, queries: Tensor) -> None:
        """Take the close ones of a product (R, n) of places on `lines`; infinite places are not pairs."""
        width = line.shape[1]
        step = max(1, (BATCH if line.device.type == "cpu" else 64 * BATCH) // width)
        for start in range(0, len(line), step):
            part = slice(start, start + step)
            scale, origin, places = lines.scale[part], lines.origin[part], line[part]
            limit = (MARGIN + scale * (self._threshold - origin)).float()
            found = (places < limit[:, None]).flatten().nonzero().squeeze(1)
            row = found // width
            column = found - row * width
            squared = (places.flatten()[found].double() - MARGIN) / scale[row] + origin[row]
            self._squared = torch.cat([self._squared, squared])
            self._pairs = torch.cat([self._pairs, queries[part][row] * self._num_pictures + pictures[column]])
            if len(self._squared) > 2 * self._capacity:
                self._squared, kept = self._squared.topk(self._capacity, largest=False, sorted=False)
                self._pairs = self._pairs[kept]
                self._threshold = float(self._squared.max())

    def true_positive_rates(self, distances: PairDistances, error: float) -> dict[float, float]:
        """For each false positive rate, the largest share of true pairs that a threshold of such a rate accepts.

        `error` bounds that of the product. Collectives: all-gathers of at most the pairs kept, for each rate.
        """
        true_distances, shares = torch.cat(self.true_distances), {}
        for rate, num_accepted in self._num_accepted.items():
            limit = torch.inf
            if num_accepted < self._num_false:  # the exact distance of the first false pair that is not accepted
                squared = distributed.all_gather_uneven_rows(self._squared)
                pivot = squared.sort().values[num_accepted]
                pairs = self._pairs[(self._squared - pivot).abs() <= 2 * error]
                exact = distances(pairs // self._num_pictures, pairs % self._num_pictures)
                exact = distributed.all_gather_uneven_rows(exact).sort().values
                limit = float(exact[num_accepted - int((squared - pivot < -2 * error).sum())])
            shares[rate] = float((true_distances < limit).double().mean())
        return shares
