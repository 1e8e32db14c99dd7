"""The nearest pictures of each picture among all, among those of its camera, or among those of the others: exact.

A float32 product proposes a few more candidates than asked for; their distances are computed in float64. Where others
may be as near within the product's error, as with many equal pictures, all distances of that picture are computed.

Letters: N pictures, n of them on this rank, D feature length, k neighbours, c candidates, R rows of a block, m pictures
of a chunk, u pictures that need all their distances.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.clustering.pictures import Pictures, exact_products
from ecn_dist.ranking.distances import full_precision

SPARE = 8  # candidates beyond k
MAX_BLOCK = 2048  # rows of a product
SCRATCH = (torch.float32, torch.bool)  # of a product
MANY = 2  # times c: if more are nearer, sorting them out is slower than a top-k
ROWS_OF_ALL = 256  # pictures at a time whose distances to all are computed
OTHER_SUM = 1e-10  # more than two ways of summing up in float64 can differ by


@dataclass(frozen=True)
class Ranking:
    """The `k` nearest among all pictures or those of the same camera (the picture itself first), or of the others.

    The codes of the first `head` of them are averaged.
    """

    k: int
    head: int = 1
    among: Literal["all", "same", "others"] = "all"


@dataclass
class Neighbors:
    """Nearest pictures of this rank's, nearest first."""

    numbers: Tensor  # (n, k) int64; -1 where there are fewer
    distances: Tensor  # (n, k) float64: max(0, 2 - 2 f.g)


@dataclass
class _Candidates:
    """The nearest so far by the product."""

    similarity: Tensor  # (n, c) float32, in no order
    numbers: Tensor  # (n, c) int64; -1: none


def chunk_size(dim: int, memory_budget: int) -> int:
    """How many pictures make a chunk, so that its product and its features fit into `memory_budget` bytes."""
    return max(16, memory_budget // (16 * MAX_BLOCK + 16 * dim) // 16 * 16)


def nearest(pictures: Pictures, rankings: list[Ranking], cameras: Tensor | None, memory_budget: int) -> list[Neighbors]:
    """The neighbours of this rank's pictures by each of `rankings`, from one pass over all features.

    `cameras` (N,) int64 on the device of the features are needed for rankings by camera. Equal distances: the lower
    number first. Collectives: those of `Pictures.chunks` and `Pictures.dots`, and one all-reduce a ranking.
    """
    size = chunk_size(pictures.dim, memory_budget)
    with full_precision(pictures.own.device):
        found = _candidates(pictures, rankings, cameras, size)
        return [
            _exact(pictures, ranking, candidates, cameras, size)
            for ranking, candidates in zip(rankings, found, strict=True)
        ]


def _candidates(pictures: Pictures, rankings: list[Ranking], cameras: Tensor | None, size: int) -> list[_Candidates]:
    own = pictures.own
    found = []
    for ranking in rankings:
        shape = (len(own), ranking.k + SPARE)
        similarity = torch.full(shape, -torch.inf, dtype=torch.float32, device=own.device)
        found.append(_Candidates(similarity, torch.full(shape, -1, dtype=torch.int64, device=own.device)))
    products, marks = (torch.empty(MAX_BLOCK * size, dtype=dtype, device=own.device) for dtype in SCRATCH)
    for numbers, features in pictures.chunks(size):
        right = features.float().T
        for start in range(0, len(own), MAX_BLOCK):
            rows = slice(start, start + MAX_BLOCK)
            left = own[rows].float()
            product, nearer = (part[: len(left) * len(numbers)].view(len(left), -1) for part in (products, marks))
            torch.mm(left, right, out=product)
            for ranking, candidates in zip(rankings, found, strict=True):
                out = _left_out(ranking, pictures.ids[rows], numbers, cameras)
                ranked = product if out is None else product.masked_fill(out, -torch.inf)
                _merge(candidates, rows, ranked, numbers, nearer)
    return found


def _left_out(ranking: Ranking, rows: Tensor, columns: Tensor, cameras: Tensor | None) -> Tensor | None:
    """(R, m) pairs of pictures `rows` and `columns` that are not ranked; None: all are."""
    if cameras is None or ranking.among == "all":
        return None
    same = cameras[rows, None] == cameras[columns]
    return same if ranking.among == "others" else ~same


def _merge(candidates: _Candidates, rows: slice, product: Tensor, numbers: Tensor, nearer: Tensor) -> None:
    """Put what is nearer in a product (R, m), of the pictures `numbers` (m,), among the candidates of `rows`.

    Overwrites `nearer` (R, m).
    """
    best, kept = candidates.similarity[rows], candidates.numbers[rows]
    width = best.shape[1]
    torch.gt(product, best.amin(1, keepdim=True), out=nearer)
    if int(nearer.count_nonzero()) > MANY * width * len(best):  # at first; then few
        new, column = product.topk(min(width, product.shape[1]), sorted=False)
        new_numbers = numbers[column]
    else:
        row, column = nearer.nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(best))
        most = int(count.max())
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        new, new_numbers = best.new_full((len(best), most), -torch.inf), kept.new_full((len(best), most), -1)
        new[row, place], new_numbers[row, place] = product[row, column], numbers[column]
    candidates.similarity[rows], order = torch.cat([best, new], dim=1).topk(width, sorted=False)
    candidates.numbers[rows] = torch.cat([kept, new_numbers], dim=1).gather(1, order)


def _exact(
    pictures: Pictures, ranking: Ranking, candidates: _Candidates, cameras: Tensor | None, size: int
) -> Neighbors:
    """The nearest, from candidates by the product."""
    similarity, numbers = candidates.similarity, candidates.numbers
    numbers = numbers.masked_fill(similarity.isneginf(), -1)
    ids, worst = pictures.ids, similarity.amin(1)
    if ranking.among != "others":  # the picture itself, in place of the last
        missing = (numbers != ids[:, None]).all(1).nonzero().squeeze(1)
        numbers[missing, similarity[missing].argmin(1)] = ids[missing]
    numbers = torch.where(numbers < 0, pictures.total, numbers).sort(1).values
    there = numbers < pictures.total
    row = there.nonzero()[:, 0]
    distances = torch.full(numbers.shape, torch.inf, dtype=torch.float64, device=numbers.device)
    distances[there] = _distance(pictures.dots(row, numbers[there], size))
    distances, order = _itself_first(distances, numbers, ids).sort(dim=1, stable=True)
    numbers = numbers.gather(1, order)[:, : ranking.k]
    distances = distances[:, : ranking.k]
    # No picture that is no candidate is nearer than this.
    beyond = _distance(worst.double() + _error_bound(pictures))
    unsure = ((beyond <= distances[:, -1]) & ~worst.isneginf()).nonzero().squeeze(1)
    if distributed.any_rank(len(unsure) > 0):
        limit = distances[unsure, -1] + OTHER_SUM
        numbers[unsure], distances[unsure] = _among_all(pictures, ranking, unsure, limit, cameras, size)
    itself = numbers == ids[:, None]
    distances = torch.where(itself, _distance(pictures.squares)[:, None], distances)
    return Neighbors(torch.where(distances.isinf(), -1, numbers), distances)


def _distance(dots: Tensor) -> Tensor:
    return (2.0 - 2.0 * dots).clamp_min(0.0)


def _itself_first(distances: Tensor, numbers: Tensor, ids: Tensor) -> Tensor:
    return torch.where(numbers == ids[:, None], -1.0, distances)


def _error_bound(pictures: Pictures) -> float:
    """How far an entry of the product can be off for whatever the features are: Higham 2002, equation 3.5.

    Two roundings to float32 and D products and sums, of vectors of about unit length.
    """
    roundings = (pictures.dim + 4) * 2.0**-24
    return 1.05 * roundings / (1.0 - roundings)


def _among_all(
    pictures: Pictures,
    ranking: Ranking,
    rows: Tensor,
    limit: Tensor,
    cameras: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Numbers and distances (u, k) of the nearest of this rank's `rows` (u,), of which k are nearer than `limit` (u,).

    Collective as `Pictures.chunks`.
    """
    ids = pictures.ids[rows]
    best = limit.new_full((len(rows), ranking.k), torch.inf)
    kept = torch.full(best.shape, pictures.total, dtype=torch.int64, device=best.device)
    last, last_number = limit[:, None], kept[:, -1:].clone()  # nothing behind these is needed
    for numbers, features in pictures.chunks(size):
        for columns, right in zip(numbers.split(2 * ROWS_OF_ALL), features.split(2 * ROWS_OF_ALL), strict=True):
            for start in range(0, len(rows), ROWS_OF_ALL):
                part = slice(start, start + ROWS_OF_ALL)
                distances = _distance(exact_products(pictures.own[rows[part]], right))
                distances = _itself_first(distances, columns[None], ids[part])
                behind = (distances > last[part]) | ((distances == last[part]) & (columns > last_number[part]))
                out = _left_out(ranking, ids[part], columns, cameras)
                behind = behind if out is None else behind | out
                if behind.all():
                    continue
                distances[behind] = torch.inf
                distances = torch.cat([best[part], distances], 1)
                candidates, by_number = torch.cat([kept[part], columns.expand(len(behind), -1)], 1).sort(1)
                distances, order = distances.gather(1, by_number).sort(dim=1, stable=True)
                best[part], kept[part] = distances[:, : ranking.k], candidates.gather(1, order)[:, : ranking.k]
                full = best[part, -1:].isfinite()
                last[part] = torch.where(full, best[part, -1:], last[part])
                last_number[part] = torch.where(full, kept[part, -1:], last_number[part])
    return kept, best
