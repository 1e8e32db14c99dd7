"""Ranked lists of a few queries: which queries, what the gallery answers, and the sheet that shows it.

Shape letters: Q queries, G gallery pictures here (all of them, or this rank's part), D feature length, n chosen
queries, T length of a list, W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.reporting.pictures.canvas import FAINT_INK, NEUTRAL, Sheet

ReadPicture = Callable[[int], Image.Image]

NO_ROW = -1  # a list shorter than asked for ends in these
CHUNK_BYTES = 16 * 2**20  # of a chunk's distances as float64; sorting takes a few times as much


@dataclass(frozen=True)
class Match:
    """One gallery picture in a query's ranking."""

    row: int
    """Its row in the whole gallery."""
    rank: int
    """1 for the nearest gallery picture that is not junk."""
    distance: float
    right: bool
    camid: int | None


@dataclass(frozen=True)
class RankedList:
    """What the gallery answers to one query; junk (same person, same camera) is left out."""

    query: int
    """Row among the queries."""
    camid: int | None
    matches: tuple[Match, ...]
    """The nearest gallery pictures, in order."""
    first_right: Match | None
    """The nearest true match; None where the gallery has none."""
    num_right: int
    """How many true matches the gallery has."""


def choose_queries(
    average_precision_Q: Tensor | np.ndarray,
    pids_Q: Tensor | np.ndarray,
    count: int,
    kind: Literal["best", "worst", "random"],
    seed: int = 0,
) -> list[int]:
    """Rows of at most `count` queries that have a true match: the best, the worst, or any.

    `average_precision_Q` is NaN for a query that is not counted. A person comes a second time only when there are no
    more people. Equal precisions are put in a random order, which `seed` fixes.
    """
    precision = np.asarray(average_precision_Q, dtype=np.float64)
    pids = np.asarray(pids_Q)
    counted = np.flatnonzero(~np.isnan(precision))
    order = np.random.default_rng(seed).permutation(counted)
    if kind != "random":
        key = precision[order] if kind == "worst" else -precision[order]
        order = order[np.argsort(key, kind="stable")]
    turn: dict[int, int] = {}  # how often a person came before: first all people once, then again
    turns = np.empty(len(order), dtype=np.int64)
    for position, pid in enumerate(pids[order].tolist()):
        turns[position] = turn[pid] = turn.get(pid, -1) + 1
    return order[np.argsort(turns, kind="stable")][:count].tolist()


@torch.no_grad()
def ranked_lists(
    query_features_QD: Tensor,
    query_pids_Q: Tensor,
    query_camids_Q: Tensor | None,
    gallery_features_GD: Tensor,
    gallery_pids_G: Tensor,
    gallery_camids_G: Tensor | None,
    queries: Sequence[int],
    *,
    top: int = 10,
    gallery_sharded: bool = False,
) -> list[RankedList]:
    """Rank the gallery for `queries` (rows of the query tensors): Euclidean distance on features as given.

    Gallery pictures of the query's own pid and camid are junk and left out; without camera numbers nothing is. Equal
    distances keep gallery order. The n x G distances are the only large thing made.

    With `gallery_sharded` every rank gives its own contiguous part of the gallery, in rank order, and the same
    queries; all ranks must call, and all get the same lists, with rows of the whole gallery. Collectives: all-gather
    of the ranks' nearest, all-reduce of counts.
    """
    if top < 1:
        raise UserError(f"top: a ranked list needs a length of 1 or more, not {top}")
    offset = _rows_before(len(gallery_pids_G)) if gallery_sharded else 0
    lists: list[RankedList] = []
    for chosen in query_chunks(queries, len(gallery_pids_G), gallery_sharded):
        found = distances(
            chosen,
            query_features_QD,
            query_pids_Q,
            query_camids_Q,
            gallery_features_GD,
            gallery_pids_G,
            gallery_camids_G,
        )
        cameras = [None] * len(chosen) if query_camids_Q is None else query_camids_Q[chosen].tolist()
        lists += _lists(chosen, cameras, found, gallery_camids_G, offset, top, gallery_sharded)
    return lists


def query_chunks(queries: Sequence[int], gallery_rows: int, gallery_sharded: bool) -> list[list[int]]:
    """`queries` in parts whose distances to the gallery stay within CHUNK_BYTES; the same parts on every rank."""
    size = max(CHUNK_BYTES // (8 * max(gallery_rows, 1)), 1)
    if gallery_sharded:  # ranks may hold different numbers of rows
        size = int(distributed.all_reduce(torch.tensor(size), "min"))
    return [list(queries[start : start + size]) for start in range(0, len(queries), size)]


def _lists(
    queries: list[int],
    cameras: Sequence[int | None],
    found: "Distances",
    gallery_camids_G: Tensor | None,
    offset: int,
    top: int,
    gallery_sharded: bool,
) -> list[RankedList]:
    """The lists of one chunk of queries."""
    right_nG, valid_nG = found.right_nG, found.valid_nG
    distance_nG = found.distance_nG.masked_fill(~valid_nG, torch.inf)
    camids_G = torch.full_like(right_nG[0], -1, dtype=torch.int64) if gallery_camids_G is None else gallery_camids_G
    camids_G = camids_G.to(distance_nG.device)
    nearest = _nearest(distance_nG, right_nG, camids_G, offset, top)
    first = _nearest(distance_nG.masked_fill(~right_nG, torch.inf), right_nG, camids_G, offset, 1)
    if gallery_sharded:
        nearest, first = nearest.gathered(top), first.gathered(1)

    # The rank of the first true match: how many come before it, by distance and then by row.
    rows_G = offset + torch.arange(distance_nG.shape[1], device=distance_nG.device)
    first_distance_n1, first_row_n1 = first.distance_nT.to(rows_G.device), first.row_nT.to(rows_G.device)
    before_nG = (distance_nG < first_distance_n1) | ((distance_nG == first_distance_n1) & (rows_G < first_row_n1))
    counts_2n = torch.stack([(before_nG & valid_nG).sum(1), right_nG.sum(1)]).cpu()
    if gallery_sharded:
        counts_2n = distributed.all_reduce(counts_2n)
    before_n, num_right_n = counts_2n.tolist()

    has_cameras = gallery_camids_G is not None
    return [
        RankedList(
            query=query,
            camid=cameras[i],
            matches=tuple(nearest.matches(i, has_cameras)),
            first_right=next(iter(first.matches(i, has_cameras, start=before_n[i] + 1)), None),
            num_right=num_right_n[i],
        )
        for i, query in enumerate(queries)
    ]


class Distances(NamedTuple):
    """Of n queries to the gallery: how far, which are true matches (junk is none), and which are not junk."""

    distance_nG: Tensor
    right_nG: Tensor
    valid_nG: Tensor


def distances(
    queries: Sequence[int],
    query_features_QD: Tensor,
    query_pids_Q: Tensor,
    query_camids_Q: Tensor | None,
    gallery_GD: Tensor,
    gallery_pids_G: Tensor,
    gallery_camids_G: Tensor | None,
) -> Distances:
    """Euclidean distances of `queries` (rows of the query tensors), on the gallery features' device."""
    device = gallery_GD.device
    query_nD, pids_n = query_features_QD[queries], query_pids_Q[queries]
    camids_n = None if query_camids_Q is None else query_camids_Q[queries]
    dtype = torch.float64 if gallery_GD.dtype == torch.float64 else torch.float32
    # Differences, not a product: exact for equal features, and a few queries cost little.
    distance_nG = torch.cdist(
        query_nD.to(device, dtype), gallery_GD.to(dtype), compute_mode="donot_use_mm_for_euclid_dist"
    )
    right_nG = pids_n.to(device)[:, None] == gallery_pids_G.to(device)[None, :]
    valid_nG = torch.ones_like(right_nG)
    if camids_n is not None and gallery_camids_G is not None:
        valid_nG = ~(right_nG & (camids_n.to(device)[:, None] == gallery_camids_G.to(device)[None, :]))
    return Distances(distance_nG, right_nG & valid_nG, valid_nG)


@dataclass(frozen=True)
class _Nearest:
    """The nearest T gallery pictures of n queries, on the CPU; padded with infinite distance."""

    distance_nT: Tensor
    row_nT: Tensor
    right_nT: Tensor
    camid_nT: Tensor

    def gathered(self, top: int) -> "_Nearest":
        """The nearest over all ranks. Ranks hold ascending rows, so a stable order keeps equals in gallery order."""
        columns = [self.distance_nT, self.row_nT, self.right_nT, self.camid_nT]
        parts = [distributed.all_gather_rows(column[None]) for column in columns]  # (W, n, T) each
        distance, row, right, camid = (part.transpose(0, 1).flatten(1) for part in parts)
        order = torch.sort(distance, dim=1, stable=True).indices[:, :top]
        return _Nearest(*(column.gather(1, order) for column in (distance, row, right, camid)))

    def matches(self, i: int, has_cameras: bool, start: int = 1) -> list[Match]:
        """Query i's list, without the padding."""
        columns = zip(
            self.distance_nT[i].tolist(),
            self.row_nT[i].tolist(),
            self.right_nT[i].tolist(),
            self.camid_nT[i].tolist(),
            strict=True,
        )
        return [
            Match(row, start + position, distance, bool(right), camid if has_cameras else None)
            for position, (distance, row, right, camid) in enumerate(columns)
            if row != NO_ROW
        ]


def _nearest(distance_nG: Tensor, right_nG: Tensor, camids_G: Tensor, offset: int, top: int) -> _Nearest:
    distance, column = torch.sort(distance_nG, dim=1, stable=True)
    distance, column = distance[:, :top], column[:, :top]
    row = torch.where(torch.isinf(distance), NO_ROW, column + offset)
    found = [distance, row, right_nG.gather(1, column).to(torch.int64), camids_G.to(torch.int64)[column]]
    missing = top - distance.shape[1]
    fills = [torch.inf, NO_ROW, 0, -1]
    padded = [
        torch.nn.functional.pad(values, (0, missing), value=fill) for values, fill in zip(found, fills, strict=True)
    ]
    return _Nearest(*(values.cpu() for values in padded))


def _rows_before(own_rows: int) -> int:
    """How many gallery rows the ranks before this one hold."""
    sizes = distributed.all_gather_rows(torch.tensor([own_rows])).tolist()
    return sum(sizes[: distributed.rank()])


# --- drawing -------------------------------------------------------------------------------------------------------

_CELL_WIDTH, _CELL_HEIGHT = 0.66, 1.32
_STEP = _CELL_WIDTH + 0.1
_ROW_HEIGHT = _CELL_HEIGHT + 0.42
_LABEL_WIDTH = 1.05
_HEAD = 0.95


def draw_ranked_lists(
    lists: Sequence[RankedList],
    read_query: ReadPicture,
    read_gallery: ReadPicture,
    *,
    title: str = "Ranked lists",
    subtitle: str = "",
    average_precision_Q: Tensor | np.ndarray | None = None,
) -> Figure:
    """One row a query: the query in a neutral frame, then its nearest gallery pictures with rank and camera.

    `read_query` and `read_gallery` give the picture of a row of the queries, of the whole gallery.
    """
    columns = max((len(ranked.matches) for ranked in lists), default=1)
    width = 2 * Sheet.MARGIN + _LABEL_WIDTH + _STEP + 0.12 + columns * _STEP
    sheet = Sheet(max(width, 5.2), _HEAD + max(len(lists), 1) * _ROW_HEIGHT)
    sheet.heading(title, subtitle)
    sheet.legend(Sheet.MARGIN, 0.64)
    if not lists:
        sheet.text(Sheet.MARGIN, _HEAD + 0.2, "No query has a true match in the gallery.", size=9)
    for line, ranked in enumerate(lists):
        y = _HEAD + line * _ROW_HEIGHT + 0.06
        average_precision = None if average_precision_Q is None else float(average_precision_Q[ranked.query])
        _label(sheet, ranked, average_precision, y)
        x = Sheet.MARGIN + _LABEL_WIDTH
        sheet.picture(read_query(ranked.query), x, y, _CELL_WIDTH, _CELL_HEIGHT, frame=NEUTRAL)
        sheet.text(x + _CELL_WIDTH / 2, y + _CELL_HEIGHT + 0.06, "query", size=7, align="center", bold=True)
        x += _STEP + 0.12
        for match in ranked.matches:
            verdict: Literal["right", "wrong"] = "right" if match.right else "wrong"
            sheet.picture(read_gallery(match.row), x, y, _CELL_WIDTH, _CELL_HEIGHT, verdict=verdict)
            sheet.text(x + _CELL_WIDTH / 2, y + _CELL_HEIGHT + 0.06, match_label(match), size=7, align="center")
            x += _STEP
    return sheet.figure


def match_label(match: Match) -> str:
    """Rank, and the camera where it is known."""
    return f"{match.rank:,}" if match.camid is None else f"{match.rank:,} · cam {match.camid}"


def _label(sheet: Sheet, ranked: RankedList, average_precision: float | None, y: float) -> None:
    """At the left of a row: which query, its average precision, where its first true match stands."""
    lines = [f"query {ranked.query}"]
    sheet.text(Sheet.MARGIN, y, lines[0], size=8, bold=True)
    facts = [] if ranked.camid is None else [f"camera {ranked.camid}"]
    if average_precision is not None:
        facts.append(f"AP {100 * average_precision:.1f} %")
    facts.append(f"{ranked.num_right} true match" + ("" if ranked.num_right == 1 else "es"))
    if ranked.first_right is not None:
        facts.append(f"first at rank {ranked.first_right.rank:,}")
    sheet.text(Sheet.MARGIN, y + 0.2, "\n".join(facts), size=7, color=FAINT_INK)
