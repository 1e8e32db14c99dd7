"""From counts of closer pictures to the figures of a query: areas under the precision-recall curve, ranks, mINP.

Shape letters: R queries, T true matches of the query that has most, L recall levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist.ranking.counting import Closer
from ecn_dist.ranking.matches import TrueMatches


@dataclass(frozen=True)
class QueryMeasures:
    """Of each query (R,) float64; NaN where it has no true match."""

    trapezoid: Tensor  # area by the trapezoid rule: scikit-learn's precision_recall_curve and auc
    stepwise: Tensor  # area by steps: scikit-learn's average_precision_score
    inverse_penalty: Tensor  # true matches over the rank of the last one (Ye et al., TPAMI 2021)
    first_rank: Tensor  # rank of the first true match, from 1
    precision: Tensor  # (R, L) highest precision at the recall level or beyond


def measure(matches: TrueMatches, closer: Closer, num_levels: int = 2) -> QueryMeasures:
    """The figures of the ranking of a gallery of one group.

    A point of the precision-recall curve is a distance, with all pictures up to it. Between the points of two true
    matches only false ones are added, so recall stands still while precision falls: the trapezoid that ends at a true
    match begins at the precision just before it. The curve begins at precision 1 if the first picture is true, else 0.
    """
    strictly, or_equal, in_order = closer.counts[:, 0].double().unbind(0)
    valid, score, count = matches.valid, matches.score, matches.count.double()
    rows, width = score.shape
    if width == 0:
        nothing = score.new_full((rows,), torch.nan)
        return QueryMeasures(nothing, nothing, nothing, nothing, nothing[:, None].expand(rows, num_levels))
    column = torch.arange(width, device=score.device)
    step = score[:, 1:] != score[:, :-1]
    edge = step.new_ones((rows, 1))
    # True matches at one distance are one point of the curve, which stands at the last of them.
    point = valid & (torch.cat([step, edge], dim=1) | (column == matches.count[:, None] - 1))
    before = torch.where(torch.cat([edge, step], dim=1), column, 0).cummax(1).values.double()
    found = column.double() + 1
    at = found / (found + or_equal)
    just_before = torch.where(before + strictly > 0, before / (before + strictly), 1.0)
    gain = torch.where(point, (found - before) / count[:, None], 0.0)
    at = torch.where(point, at, 0.0)
    last = (matches.count - 1).clamp_min(0)[:, None]

    levels = torch.linspace(0, 1, num_levels, dtype=torch.float64, device=score.device)
    needed = (levels * count[:, None] - 1e-9).ceil().long().clamp_min(1) - 1
    best = at.flip(1).cummax(1).values.flip(1)
    none = matches.count == 0
    return QueryMeasures(
        (gain * (at + just_before) / 2).sum(1).masked_fill(none, torch.nan),
        (gain * at).sum(1).masked_fill(none, torch.nan),
        (count / (count + in_order.gather(1, last).squeeze(1))).masked_fill(none, torch.nan),
        (in_order[:, 0] + 1).masked_fill(none, torch.nan),
        best.gather(1, needed.clamp_max(width - 1)).masked_fill(none[:, None], torch.nan),
    )


def only_group(matches: TrueMatches, closer: Closer, group: int) -> tuple[TrueMatches, Closer]:
    """The true matches seen by camera `group` alone, in order, with the counts that belong to them."""
    mine = matches.valid & (matches.camera == group)
    order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)
    count = mine.sum(1)
    kept = order[:, : int(count.max())]

    def pick(values: Tensor) -> Tensor:
        return values.gather(1, kept)

    chosen = TrueMatches(pick(matches.score), pick(matches.position), pick(matches.camera), count)
    return chosen, Closer(torch.stack([pick(counts) for counts in closer.counts[:, group]])[:, None])
