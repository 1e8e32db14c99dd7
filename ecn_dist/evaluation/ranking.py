"""Retrieval metrics: CMC, mAP and mINP of queries against a gallery (METHOD.md, "Evaluation").

Shape letters: Q queries, G gallery pictures, D feature length, K CMC length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError


@dataclass(frozen=True)
class RankingResult:
    """What `evaluate_ranking` measures; shares are fractions in 0..1.

    mAP is the published figure (area under the precision-recall curve by the trapezoid rule), mAP_stepwise the average
    precision of most other toolboxes, mINP that of Ye et al., TPAMI 2021. `cmc[k - 1]` is rank-k.
    """

    mAP: float
    mAP_stepwise: float
    mINP: float
    cmc: np.ndarray
    num_valid_queries: int


def evaluate_ranking(
    query_features: Tensor,
    query_pids: Tensor,
    query_camids: Tensor | None,
    gallery_features: Tensor,
    gallery_pids: Tensor,
    gallery_camids: Tensor | None,
    *,
    gallery_sharded: bool = False,
    max_rank: int = 50,
) -> RankingResult:
    """Rank the gallery for every query by Euclidean distance and measure the ranking.

    Features are (Q, D) and (G, D) floats, used as given; pids and camids are (Q,) and (G,) integers. Gallery pictures
    with the query's pid and camid are left out (with camids None: nothing is). A query without a true match is not
    counted; where none has one, a `UserError` is raised on every rank. With `gallery_sharded` each rank gives its own
    part of the gallery, in rank order; else every rank gives the same. Collectives: gathers of the gallery's parts.
    """
    if (query_camids is None) != (gallery_camids is None):
        raise UserError("evaluate_ranking: camids are given for one of query and gallery; give both or neither")
    if query_camids is None or gallery_camids is None:
        query_camids = torch.zeros_like(query_pids)
        gallery_camids = torch.ones_like(gallery_pids)
    if gallery_sharded:
        parts = distributed.gather_objects((gallery_features.cpu(), gallery_pids.cpu(), gallery_camids.cpu()))
        gallery_features, gallery_pids, gallery_camids = (torch.cat(part) for part in zip(*parts, strict=True))
    gallery = gallery_features.detach().cpu().numpy().astype(np.float64)
    pids, camids = gallery_pids.cpu().numpy(), gallery_camids.cpu().numpy()
    rows = []
    for query, pid, camid in zip(
        query_features.detach().cpu().double().numpy(), query_pids.tolist(), query_camids.tolist(), strict=True
    ):
        kept = ~((pids == pid) & (camids == camid))
        match = (pids == pid)[kept]
        if match.any():
            rows.append(_measure(((gallery[kept] - query) ** 2).sum(1), match))
    if not rows:
        raise UserError("evaluate_ranking: no query has a true match in the gallery; check the pids and camids")
    trapezoid, stepwise, inverse, first = np.array(rows).T
    cmc = np.array([(first < k).mean() for k in range(1, max(max_rank, 50) + 1)])
    return RankingResult(float(trapezoid.mean()), float(stepwise.mean()), float(inverse.mean()), cmc, len(rows))


def _measure(distance: np.ndarray, match: np.ndarray) -> tuple[float, float, float, int]:
    """One query: the two areas, the inverse negative penalty, and the 0-based rank of the first true match."""
    order = np.argsort(distance, kind="stable")
    distance, match = distance[order], match[order]
    true_so_far = np.cumsum(match)
    last_of_tie = np.append(distance[1:] != distance[:-1], True)
    recall = np.append(0.0, true_so_far[last_of_tie] / true_so_far[-1])
    precision = np.append(1.0, true_so_far[last_of_tie] / (np.flatnonzero(last_of_tie) + 1))
    width = np.diff(recall)
    ranks = np.flatnonzero(match)
    return (
        float((width * (precision[1:] + precision[:-1]) / 2).sum()),
        float((width * precision[1:]).sum()),
        len(ranks) / float(ranks[-1] + 1),
        int(ranks[0]),
    )
