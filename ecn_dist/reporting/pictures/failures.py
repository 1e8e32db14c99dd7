"""Where the ranking goes wrong: a sheet of failed queries, and what the wrong first answers have in common.

Shape letters as in ranked.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.reporting.pictures.canvas import FAINT_INK, NEUTRAL, Sheet
from ecn_dist.reporting.pictures.ranked import Match, RankedList, ReadPicture, match_label


@dataclass(frozen=True)
class FirstAnswers:
    """What stands at rank 1, over `num_queries` queries that have a true match."""

    num_queries: int
    num_wrong: int
    num_wrong_own_camera: int | None
    """Wrong first answers taken by the query's own camera; None without camera numbers."""
    own_camera_share: float | None
    """Share of the gallery (junk left out) taken by the query's own camera, mean over these queries: what chance
    would give for `num_wrong_own_camera / num_wrong`."""


def first_answers(
    lists: Sequence[RankedList],
    query_pids_Q: Tensor,
    gallery_pids_G: Tensor,
    gallery_camids_G: Tensor | None,
    *,
    gallery_sharded: bool = False,
) -> FirstAnswers:
    """Count right and wrong first answers, and how many of the wrong ones share the query's camera.

    A network that recognises cameras rather than people puts its own camera first far more often than chance would.
    With `gallery_sharded` every rank gives its own part, and all must call (one all-reduce).
    """
    answered = [ranked for ranked in lists if ranked.num_right > 0]
    wrong = [ranked for ranked in answered if not ranked.matches[0].right]
    if gallery_camids_G is None:
        return FirstAnswers(len(answered), len(wrong), None, None)
    own, junk = [], []
    for ranked in answered:
        assert ranked.camid is not None  # cameras are known for both or neither
        same_camera_G = gallery_camids_G.eq(ranked.camid)
        own.append(int(same_camera_G.sum()))
        junk.append(int((same_camera_G & gallery_pids_G.eq(int(query_pids_Q[ranked.query]))).sum()))
    counts_2n = torch.tensor([own, junk], dtype=torch.int64)
    size = torch.tensor(len(gallery_pids_G))
    if gallery_sharded:
        counts_2n, size = distributed.all_reduce(counts_2n), distributed.all_reduce(size)
    own_n, junk_n = counts_2n.double()
    share = ((own_n - junk_n) / (size - junk_n)).mean().item() if answered else None
    same = sum(ranked.matches[0].camid == ranked.camid for ranked in wrong)
    return FirstAnswers(len(answered), len(wrong), same, share)


_CELL_WIDTH, _CELL_HEIGHT = 0.78, 1.56
_STEP = _CELL_WIDTH + 0.12
_BLOCK_WIDTH, _BLOCK_HEIGHT = 3 * _STEP + 0.3, _CELL_HEIGHT + 0.72
_HEAD = 0.98


def draw_failures(
    lists: Sequence[RankedList],
    read_query: ReadPicture,
    read_gallery: ReadPicture,
    *,
    title: str = "Failures",
    subtitle: str = "",
    average_precision_Q: Tensor | np.ndarray | None = None,
    columns: int = 3,
) -> Figure:
    """For each query: its picture, the wrong picture that came first, and the true match that should have.

    Lists whose first answer is right are left out: they are no failures.
    """
    failures = [ranked for ranked in lists if ranked.matches and not ranked.matches[0].right and ranked.first_right]
    columns = max(min(columns, len(failures)), 1)
    lines = -(-len(failures) // columns)
    width = 2 * Sheet.MARGIN + columns * _BLOCK_WIDTH - 0.3
    sheet = Sheet(max(width, 5.2), _HEAD + max(lines * _BLOCK_HEIGHT, 0.5))
    sheet.heading(title, subtitle)
    sheet.legend(Sheet.MARGIN, 0.66)
    if not failures:
        sheet.text(Sheet.MARGIN, _HEAD + 0.1, "None among these queries: a true match came first every time.", size=9)
    for position, ranked in enumerate(failures):
        line, column = divmod(position, columns)
        x, y = Sheet.MARGIN + column * _BLOCK_WIDTH, _HEAD + line * _BLOCK_HEIGHT
        words = f"query {ranked.query}"
        sheet.text(x, y, words, size=8, bold=True)
        if average_precision_Q is not None:
            precision = f"AP {100 * float(average_precision_Q[ranked.query]):.1f} %"
            sheet.text(x + 3 * _STEP - 0.12, y, precision, size=7.5, color=FAINT_INK, align="right")
        y += 0.22
        sheet.picture(read_query(ranked.query), x, y, _CELL_WIDTH, _CELL_HEIGHT, frame=NEUTRAL)
        _caption(sheet, x, y, "query" if ranked.camid is None else f"query · cam {ranked.camid}", "")
        first, right = ranked.matches[0], ranked.first_right
        assert right is not None  # the selection above
        sheet.picture(read_gallery(first.row), x + _STEP, y, _CELL_WIDTH, _CELL_HEIGHT, verdict="wrong")
        _caption(sheet, x + _STEP, y, *_words(first))
        sheet.picture(read_gallery(right.row), x + 2 * _STEP, y, _CELL_WIDTH, _CELL_HEIGHT, verdict="right")
        _caption(sheet, x + 2 * _STEP, y, *_words(right))
    return sheet.figure


def _words(match: Match) -> tuple[str, str]:
    return f"rank {match_label(match)}", f"distance {match.distance:.3g}"


def _caption(sheet: Sheet, x: float, y: float, first: str, second: str) -> None:
    center = x + _CELL_WIDTH / 2
    sheet.text(center, y + _CELL_HEIGHT + 0.06, first, size=7, align="center")
    sheet.text(center, y + _CELL_HEIGHT + 0.2, second, size=6.5, color=FAINT_INK, align="center")
