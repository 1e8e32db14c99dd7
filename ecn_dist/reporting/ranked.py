"""Which queries are shown, and what the gallery answers to them.

Shape letters: Q queries, G gallery pictures, n chosen queries.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ecn_dist import distributed
from ecn_dist.ranking import nearest_pictures
from ecn_dist.ranking.evaluating import Evaluation

Kind = Literal["best", "worst", "random"]


@dataclass(frozen=True)
class Match:
    """One gallery picture in a query's ranking: its row in the whole gallery, and its rank, 1 for the nearest."""

    row: int
    rank: int
    right: bool
    camid: int | None


@dataclass(frozen=True)
class RankedList:
    """What the gallery answers to one query (a row of the queries); junk (same person, same camera) is left out."""

    query: int
    camid: int | None
    average_precision: float
    matches: tuple[Match, ...]  # the nearest gallery pictures, in order
    first_right: Match | None  # the nearest true match; None where the gallery has none
    num_right: int  # true matches in the gallery


class Answers:
    """What the whole gallery of an evaluation answers, on every rank; it must rank by plain distance."""

    def __init__(self, evaluation: Evaluation) -> None:
        """Collective: the labels of the gallery are gathered."""
        query, part, self._evaluation = evaluation.query, evaluation.gallery_part, evaluation
        pids, camids = (distributed.all_gather_uneven_rows(labels) for labels in (part.pids, part.camids))
        labels = (query.pids, pids, query.camids, camids)
        self.pids_Q, self.pids_G, self.camids_Q, self.camids_G = (values.cpu().numpy() for values in labels)

    def lists(self, queries: list[int], top: int) -> list[RankedList]:
        """The `top` nearest of each of `queries`, and its nearest true match. Equal distances keep gallery order.

        Collective: as `nearest_pictures`.
        """
        if not queries:
            return []
        result, known = self._evaluation.result, not self._evaluation.camera_free
        junk_nG = self._junk(queries)
        features, gallery = self._evaluation.query.features[queries], self._evaluation.gallery_part.features
        _, rows_nk = nearest_pictures(features, gallery, top + int(junk_nG.sum(1).max()), gallery_sharded=True)

        def match(query: int, row: int, rank: int) -> Match:
            right = bool(self.pids_G[row] == self.pids_Q[query])
            return Match(row, rank, right, int(self.camids_G[row]) if known else None)

        def ranked(query: int, rows_k: np.ndarray, junk_G: np.ndarray) -> RankedList:
            first, rows = int(result.first_match[query]), rows_k[~junk_G[rows_k]][:top].tolist()
            return RankedList(
                query,
                camid=int(self.camids_Q[query]) if known else None,
                average_precision=float(result.average_precision[query]),
                matches=tuple(match(query, row, rank) for rank, row in enumerate(rows, start=1)),
                first_right=match(query, first, int(result.first_match_rank[query])) if first >= 0 else None,
                num_right=int(result.num_matches[query]),
            )

        return list(map(ranked, queries, rows_nk.cpu().numpy(), junk_nG))

    def _junk(self, queries: list[int]) -> np.ndarray:
        """(n, G) who is left out."""
        same = (self.pids_Q[queries, None] == self.pids_G) & (self.camids_Q[queries, None] == self.camids_G)
        return same & (not self._evaluation.camera_free)

    def first(self, queries: list[int]) -> dict[str, Any]:
        """Of these queries that have a true match: how many have a wrong first answer, and how many of those are by the
        query's own camera; and the share of the gallery (junk left out) that its camera took, which is chance: a
        network that recognises cameras rather than people puts its own first far more often. Collective."""
        answered = [ranked for ranked in self.lists(queries, 1) if ranked.first_right and ranked.matches]
        wrong = [ranked for ranked in answered if not ranked.matches[0].right]
        found: dict[str, Any] = {"num_queries": len(answered), "num_wrong": len(wrong)}
        if self._evaluation.camera_free or not answered:
            return found
        junk_nG = self._junk([ranked.query for ranked in answered])
        own_nG = self.camids_G == np.array([ranked.camid for ranked in answered])[:, None]
        share_n = (own_nG & ~junk_nG).sum(1) / (~junk_nG).sum(1)
        own_wrong = sum(ranked.matches[0].camid == ranked.camid for ranked in wrong)
        return found | {"num_wrong_own_camera": own_wrong, "own_camera_share": float(share_n.mean())}


def choose_queries(
    average_precision_Q: np.ndarray, pids_Q: np.ndarray, count: int, kind: Kind, seed: int = 0
) -> list[int]:
    """Rows of at most `count` queries that have a true match (no NaN as precision): the best, the worst, or any.

    A person comes a second time only when there are no more people. Equal precisions are put in a random order, which
    `seed` fixes.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isnan(average_precision_Q)))
    if kind != "random":
        order = order[np.argsort(average_precision_Q[order] * (1 if kind == "worst" else -1), kind="stable")]
    turns, seen = [], Counter[int]()  # how often a person came before: first all people once, then again
    for pid in pids_Q[order].tolist():
        turns.append(seen[pid])
        seen[pid] += 1
    return order[np.argsort(turns, kind="stable")][:count].tolist()
