"""Retrieval metrics of queries against a gallery: mAP, CMC, mINP and more (formulas.md, "Evaluation").

True matches first, then exact counts of the pictures before them (counting.py), then the figures (measures.py). A rank
multiplies blocks of queries with chunks of its own part of the gallery, and the counts add up.

Shape letters: Q queries, G gallery pictures, D feature length, C cameras, K CMC length, L recall levels, R queries of
a block, n pictures of a chunk, B buckets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.counting import GalleryScan, TrueMatches, num_buckets
from ecn_dist.ranking.distances import MEMORY_BUDGET, PairDistances, ProductSpace, full_precision
from ecn_dist.ranking.inputs import Labels, check_features
from ecn_dist.ranking.measures import Verification, measure
from ecn_dist.ranking.reranking import KReciprocal, RerankedScore

CMC_RANKS = 50
NUM_RECALL_LEVELS = 101


@dataclass(frozen=True)
class CameraPairs:
    """The ranking of one camera's gallery pictures alone for one camera's queries; [query camera, gallery camera].

    NaN where no query has a true match, so on the diagonal, whose true matches are junk. mAP by the trapezoid rule.
    """

    camids: np.ndarray  # (C,)
    mAP: np.ndarray  # (C, C)
    rank1: np.ndarray  # (C, C)
    num_valid_queries: np.ndarray  # (C, C) int64


@dataclass(frozen=True)
class RankingResult:
    """What `evaluate_ranking` measures; all shares are fractions in 0..1.

    mAP is the published figure (area under the precision-recall curve by the trapezoid rule), mAP_stepwise the average
    precision of most other toolboxes, mINP that of Ye et al. (TPAMI 2021). `cmc[k - 1]` is rank-k.
    """

    mAP: float
    mAP_stepwise: float
    mINP: float
    cmc: np.ndarray  # (K,)
    num_valid_queries: int
    average_precision: np.ndarray  # (Q,) by the trapezoid rule; NaN for a query without a true match
    first_match_rank: np.ndarray  # (Q,) rank of the first true match, from 1; NaN without one
    first_match: np.ndarray  # (Q,) int64, its place in the whole gallery; -1 without one
    num_matches: np.ndarray  # (Q,) int64, true matches in the gallery
    collapsed_queries: int  # queries whose distances to true and false pictures are all equal: the ranking says nothing
    recall_levels: np.ndarray  # (L,) 0..1
    precision_at_recall: np.ndarray  # (L,) mean over queries of the highest precision at this recall or beyond
    true_positive_rates: dict[float, float]  # by false positive rate, over all pairs of query and gallery picture
    camera_pairs: CameraPairs | None

    def summary(self) -> dict[str, float]:
        """The figures of a run's summary, fractions and numbers of queries: mAP, mAP_stepwise, rank1, ..."""
        ranks = {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}
        rates = {f"tpr_at_fpr_{rate:g}": share for rate, share in self.true_positive_rates.items()}
        queries = {name: getattr(self, name) for name in ("num_valid_queries", "collapsed_queries")}
        return {"mAP": self.mAP, "mAP_stepwise": self.mAP_stepwise, **ranks, "mINP": self.mINP, **rates, **queries}


def evaluate_ranking(
    query_features: Tensor,
    query_pids: Tensor,
    query_camids: Tensor | None,
    gallery_features: Tensor,
    gallery_pids: Tensor,
    gallery_camids: Tensor | None,
    *,
    gallery_sharded: bool = False,
    false_positive_rates: Sequence[float] = (1e-3, 1e-4),
    camera_pairs: bool = False,
    rerank: KReciprocal | None = None,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> RankingResult:
    """Rank the gallery for every query by Euclidean distance and measure the ranking; the same result on every rank.

    Features are (Q, D) and (G, D) floats, used as given; pids and camids are (Q,) and (G,) integers. Gallery pictures
    with the query's pid and camid are junk and left out; with camids None, for data without cameras, nothing is.
    Queries without a true match are not counted. The areas take equal distances as one threshold, as scikit-learn
    does; CMC and mINP take them in gallery order. Distances are those of float64 arithmetic on the features, whatever
    their type, the device and the number of ranks.

    Every rank gives the same queries and the same gallery (and each works on a part), or with `gallery_sharded` its
    own part of the gallery, in rank order, at times empty. `device` is where to compute, by default where the
    gallery's features are; features may lie elsewhere and are moved in chunks. `memory_budget` (bytes) bounds the
    chunks' memory; the false positive rates need about 60 bytes more for each pair that the largest of them accepts.
    `camera_pairs` adds the table of rankings by camera. With `rerank` the gallery is ranked by k-reciprocal re-ranking;
    every rank then needs all features (a gallery in parts is gathered), and there are no true positive rates, since
    such distances of two queries do not compare.

    Raises `UserError`, on every rank: features and labels that do not fit each other, features that are not finite, no
    query with a true match. Collectives: of the labels' facts, then for each block of queries a gather of its true
    matches and a sum of counts; never of features, but for `rerank`.
    """
    device = torch.device(device) if device is not None else torch.as_tensor(gallery_features).device
    with full_precision(device):
        sizes = len(query_features), len(gallery_features)
        query, gallery, first = check_features(query_features, gallery_features, gallery_sharded)
        labels = Labels((query_pids, query_camids, gallery_pids, gallery_camids), sizes, gallery_sharded, device)
        if camera_pairs and query_camids is None:
            raise UserError("a table of camera pairs needs camids", on_all_ranks=True)
        if not labels.num_true.any():
            raise UserError(
                f"none of the {len(query)} queries has a true match (same pid, other camid) in the gallery; "
                "check that pids and camids of both come from the same data set",
                on_all_ranks=True,
            )
        num_cameras = len(labels.camids) if camera_pairs else 0
        space = ProductSpace(query, gallery, device, _bytes_per_query(1, num_cameras), memory_budget)
        score = PairDistances(query, gallery, device)
        if rerank is not None:
            whole, false_positive_rates = torch.as_tensor(gallery_features), ()
            whole = distributed.all_gather_uneven_rows(gallery) if gallery_sharded else whole
            score = RerankedScore(query, whole, slice(first, first + len(gallery)), rerank, device, memory_budget)
        groups = labels.gallery_cameras if num_cameras else torch.zeros_like(labels.gallery_cameras)
        scan = GalleryScan(space, score, groups, max(num_cameras, 1), first)
        return _measured(scan, labels, num_cameras, false_positive_rates, memory_budget)


def _measured(
    scan: GalleryScan, labels: Labels, num_cameras: int, rates: Sequence[float], budget: int
) -> RankingResult:
    """The figures of all queries. Collective."""
    num_true, num_different = labels.num_true, labels.count_different()
    valid, device = num_true > 0, num_true.device
    num_valid, num_false = int(valid.sum()), int(num_different[valid].sum())
    figures = torch.full((4, len(valid)), torch.nan, dtype=torch.float64, device=device)
    first_match, collapsed = torch.full_like(num_true, -1), torch.zeros_like(num_true[0])
    precision = figures.new_zeros(NUM_RECALL_LEVELS)
    pair_sums = figures.new_zeros((3, num_cameras, num_cameras))
    verification = Verification(rates, num_false, len(labels.gallery_pids), device) if rates else None

    for queries in _blocks(num_true, num_cameras, scan.space.max_queries, budget):
        pairs, others = labels.same_pairs(queries), num_different[queries]
        matches = TrueMatches.gather(labels, queries, pairs, scan.score, scan.first)
        counts = scan.count(queries, matches, pairs, verification.watch if verification else None)
        counts = distributed.all_reduce(counts)
        in_all = counts.sum(1)
        figures[:, queries], at_levels = measure(matches, in_all, NUM_RECALL_LEVELS)
        precision += at_levels.sum(0)
        first_match[queries] = matches.position[:, 0]
        last = matches.score.gather(1, (matches.count - 1)[:, None]).squeeze(1)
        all_equal = (matches.score[:, 0] == last) & (in_all[0, :, 0] == 0) & (in_all[1, :, 0] == others)
        collapsed += (all_equal & (others > 0)).sum()
        if verification:
            verification.true_distances.append(matches.score[matches.valid])
        for camera in range(num_cameras):  # areas, first places and number of queries with a match there
            (area, _, _, first), _ = measure(*matches.of_camera(camera, counts[:, camera]))
            counted = ~area.isnan()
            values = torch.stack([area, (first == 1).double(), counted.double()])[:, counted]
            pair_sums[:, :, camera].index_add_(1, labels.query_cameras[queries][counted], values)

    true_positive_rates, of_pairs = {}, None
    if verification:
        error = float(scan.space.error_bound(valid.nonzero().squeeze(1)).max())
        true_positive_rates = verification.true_positive_rates(scan.score, error)
    if num_cameras:
        area, first, count = pair_sums.cpu().numpy()
        divisor = np.where(count > 0, count, np.nan)
        of_pairs = CameraPairs(labels.camids.cpu().numpy(), area / divisor, first / divisor, count.astype(np.int64))
    average_precision, stepwise, inverse_penalty, first_rank = figures.cpu().numpy()
    first_ranks = np.sort(first_rank[np.isfinite(first_rank)])
    return RankingResult(
        mAP=float(np.nanmean(average_precision)),
        mAP_stepwise=float(np.nanmean(stepwise)),
        mINP=float(np.nanmean(inverse_penalty)),
        cmc=np.searchsorted(first_ranks, np.arange(CMC_RANKS) + 1, side="right") / num_valid,
        num_valid_queries=num_valid,
        average_precision=average_precision,
        first_match_rank=first_rank,
        first_match=first_match.cpu().numpy(),
        num_matches=num_true.cpu().numpy(),
        collapsed_queries=int(collapsed),
        recall_levels=np.linspace(0.0, 1.0, NUM_RECALL_LEVELS),
        precision_at_recall=(precision / num_valid).cpu().numpy(),
        true_positive_rates=true_positive_rates,
        camera_pairs=of_pairs,
    )


def _blocks(num_true: Tensor, num_cameras: int, max_queries: int, budget: int) -> Iterator[Tensor]:
    """Queries with true matches (R,), fewest matches first, in blocks whose tables keep to the budget."""
    order = num_true.argsort(stable=True)
    order = order[num_true[order] > 0]
    most = num_true[order].tolist()
    start = 0
    while start < len(order):
        size = min(max_queries, len(order) - start)
        while size > 1 and size * _bytes_per_query(most[start + size - 1], num_cameras) > budget // 2:
            size //= 2
        yield order[start : start + size]
        start += size


def _bytes_per_query(num_true: int, num_cameras: int) -> int:
    return 24 * num_buckets(num_true) + (128 + 96 * max(num_cameras, 1)) * (num_true + 1)
