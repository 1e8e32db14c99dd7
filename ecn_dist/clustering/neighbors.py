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
from ecn_dist.clustering.pictures import MAX_BLOCK, Pictures, exact_products
from ecn_dist.ranking.distances import full_precision
from ecn_dist.ranking.neighbors import Nearest, in_order

SPARE = 8  # candidates beyond k
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


Neighbors = tuple[Tensor, Tensor]
"""Of this rank's pictures, nearest first: distances (n, k) float64, max(0, 2 - 2 f.g); numbers (n, k) int64, or -1"""


def nearest(pictures: Pictures, rankings: list[Ranking], cameras: Tensor | None) -> list[Neighbors]:
    """The neighbours of this rank's pictures by each of `rankings`, from one pass over all features.

    `cameras` (N,) int64 on the device of the features are needed for rankings by camera. Equal distances: the lower
    number first. Collectives: those of `Pictures.chunks` and `Pictures.dots`, and one all-reduce a ranking.
    """
    own, ids = pictures.own, pictures.ids
    with full_precision(own.device):
        like = torch.empty(0, dtype=torch.float32, device=own.device)
        candidates = [Nearest(len(own), ranking.k + SPARE, like) for ranking in rankings]  # by the product, negated
        buffer = like.new_empty(MAX_BLOCK * pictures.chunk_size)
        for numbers, features in pictures.chunks():
            right = features.float().T
            for start in range(0, len(own), MAX_BLOCK):
                block = slice(start, start + MAX_BLOCK)
                left = -own[block].float()
                product = buffer[: len(left) * len(numbers)].view(len(left), -1)
                torch.mm(left, right, out=product)
                for ranking, found in zip(rankings, candidates, strict=True):
                    found.show(start, _ranked(product, ranking, ids[block], numbers, cameras), numbers)
        return [_exact(pictures, ranking, found, cameras) for ranking, found in zip(rankings, candidates, strict=True)]


def _ranked(values: Tensor, ranking: Ranking, rows: Tensor, columns: Tensor, cameras: Tensor | None) -> Tensor:
    """The `values` (R, m) of pictures `rows` and `columns`, infinite for pairs that are not ranked."""
    if cameras is None or ranking.among == "all":
        return values
    same = cameras[rows, None] == cameras[columns]
    return values.masked_fill(same if ranking.among == "others" else ~same, torch.inf)


def _exact(pictures: Pictures, ranking: Ranking, candidates: Nearest, cameras: Tensor | None) -> Neighbors:
    """The nearest, from candidates by the product."""
    ids, numbers, worst = pictures.ids, candidates.numbers, candidates.values[:, -1]
    if ranking.among != "others":  # the picture itself, in place of the last
        missing = (numbers != ids[:, None]).all(1).nonzero().squeeze(1)
        numbers[missing, -1] = ids[missing]
    there = numbers >= 0
    distances = torch.full(numbers.shape, torch.inf, dtype=torch.float64, device=numbers.device)
    distances[there] = distance(pictures.dots(there.nonzero()[:, 0], numbers[there]))
    distances, numbers = in_order(_itself_first(distances, numbers, ids), numbers, ranking.k)
    # How far an entry of the product can be off for whatever the features are (Higham 2002, equation 3.5): two
    # roundings to float32 and D products and sums, of vectors of about unit length.
    roundings = (pictures.dim + 4) * 2.0**-24
    error = 1.05 * roundings / (1.0 - roundings)
    # No picture that is no candidate is nearer than this.
    beyond = distance(error - worst.double())
    unsure = ((beyond <= distances[:, -1]) & worst.isfinite()).nonzero().squeeze(1)
    if distributed.any_rank(len(unsure) > 0):
        limit = distances[unsure, -1] + OTHER_SUM
        distances[unsure], numbers[unsure] = _among_all(pictures, ranking, unsure, limit, cameras)
    return torch.where(numbers == ids[:, None], distance(pictures.squares)[:, None], distances), numbers


def distance(dots: Tensor) -> Tensor:
    return (2.0 - 2.0 * dots).clamp_min(0.0)


def _itself_first(distances: Tensor, numbers: Tensor, ids: Tensor) -> Tensor:
    return torch.where(numbers == ids[:, None], -1.0, distances)


def _among_all(
    pictures: Pictures, ranking: Ranking, rows: Tensor, limit: Tensor, cameras: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Distances and numbers (u, k) of the nearest of this rank's `rows` (u,), of which k are nearer than `limit` (u,).

    Collective as `Pictures.chunks`.
    """
    ids, found = pictures.ids[rows], Nearest(len(rows), ranking.k, limit)
    for numbers, features in pictures.chunks():
        for columns, right in zip(numbers.split(2 * ROWS_OF_ALL), features.split(2 * ROWS_OF_ALL), strict=True):
            for start in range(0, len(rows), ROWS_OF_ALL):
                part = slice(start, start + ROWS_OF_ALL)
                distances = distance(exact_products(pictures.own[rows[part]], right))
                distances = _itself_first(distances, columns[None], ids[part])
                distances = distances.masked_fill(distances > limit[part, None], torch.inf)
                found.show(start, _ranked(distances, ranking, ids[part], columns, cameras), columns)
    return found.values, found.numbers
