"""The nearest gallery pictures of each query: exact, in bounded memory, no Q x G matrix. And query expansion by them.

Products propose candidates, a few more than asked for, whose distances are computed exactly. Where more pictures lie
within the product's error of the last neighbour, as equal ones do, a second pass computes the distances of them all.

Shape letters: Q queries, R queries of a block, G gallery pictures, n pictures of a chunk, k neighbours, c candidates.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.distances import BATCH, MEMORY_BUDGET, PairDistances, ProductSpace, Scratch, full_precision
from ecn_dist.ranking.inputs import check_features, first_of_part, place_in_row

SPARE = 12  # candidates beyond k: if no more pictures lie within the product's error of the k-th, one pass is enough


def nearest_pictures(
    query_features: Tensor,
    gallery_features: Tensor,
    num_neighbors: int,
    *,
    gallery_sharded: bool = False,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """The `num_neighbors` (or all G, if fewer) nearest gallery pictures of each query, nearest first, on every rank.

    Features are (Q, D) and (G, D) floats, used as given. Returns Euclidean distances (Q, k) float64 and places in the
    gallery (Q, k) int64; equal distances in gallery order. With `gallery_sharded` each rank gives its own part of the
    gallery, in rank order; else all give the same and share the work. Features that are not finite or do not fit, an
    empty gallery and fewer than 1 neighbour are a `UserError` on every rank. Collectives: gathers of each rank's
    (Q, k) nearest.
    """
    if num_neighbors < 1:
        raise UserError(f"the {num_neighbors} nearest pictures are asked for; at least 1 is needed", on_all_ranks=True)
    device = torch.device(device) if device is not None else torch.as_tensor(gallery_features).device
    with full_precision(device):
        query, gallery, first = check_features(query_features, gallery_features, gallery_sharded)
        search = NeighborSearch(query, gallery, num_neighbors, device, memory_budget)
        blocks = [search.block(queries) for queries in search.blocks(0, len(query))]
        distances, pictures = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        # Each rank's nearest side by side; ranks are in gallery order.
        missing = (0, num_neighbors - distances.shape[1])
        distances = torch.nn.functional.pad(distances, missing, value=torch.inf)
        pictures = torch.nn.functional.pad(pictures + first, missing)
        parts = (distributed.all_gather_rows(values[None]) for values in (distances, pictures))
        distances, pictures = (values.transpose(0, 1).flatten(1) for values in parts)
        distances, order = distances.sort(dim=1, stable=True)
        total = int(distributed.all_reduce(torch.tensor(len(gallery))))
        kept = slice(0, min(num_neighbors, total))
        return distances[:, kept], pictures.gather(1, order)[:, kept]


def expand_queries(
    query_features: Tensor,
    gallery_features: Tensor,
    num_neighbors: int = 5,
    *,
    normalize: bool = True,
    gallery_sharded: bool = False,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """Average query expansion (Chum et al., ICCV 2007): each query becomes the mean of itself and its nearest pictures.

    Features are (Q, D) and (G, D) floats; returns (Q, D) in the query's type and on its device, for `evaluate_ranking`
    with the same gallery. `normalize` scales the means to length 1, as evaluation features are. Labels are not looked
    at: pictures of the query's own camera count like others. `gallery_sharded`, `device` and `memory_budget` as in
    `evaluate_ranking`. Collectives: gathers of each rank's nearest, a sum of (Q, D).
    """
    if num_neighbors < 1:
        raise UserError(f"query expansion by {num_neighbors} neighbours; at least 1 is needed", on_all_ranks=True)
    given: Any = {"gallery_sharded": gallery_sharded, "device": device, "memory_budget": memory_budget}
    _, places = nearest_pictures(query_features, gallery_features, num_neighbors, **given)
    query_features, gallery_features = torch.as_tensor(query_features), torch.as_tensor(gallery_features)
    first = first_of_part(len(gallery_features)) if gallery_sharded else 0
    places = places.to(gallery_features.device) - first
    total = torch.zeros(query_features.shape, dtype=torch.float64, device=query_features.device)
    for column in places.unbind(1):  # a neighbour at a time, so that no (Q, k, D) is made
        here = ((column >= 0) & (column < len(gallery_features))).nonzero().squeeze(1)
        found = gallery_features.index_select(0, column[here]).to(total)
        total.index_add_(0, here.to(total.device), found)
    if gallery_sharded:
        total = distributed.all_reduce(total)
    mean = (total + query_features) / (1 + places.shape[1])
    return (torch.nn.functional.normalize(mean) if normalize else mean).to(query_features.dtype)


class NeighborSearch:
    """Nearest pictures of blocks of queries in a gallery on this rank. All ranks make it together (`ProductSpace`)."""

    def __init__(
        self, query_features: Tensor, gallery_features: Tensor, num_neighbors: int, device: torch.device, budget: int
    ) -> None:
        self.num_pictures, self._device = len(gallery_features), device
        self._num_kept = min(num_neighbors, self.num_pictures)
        self._num_candidates = min(num_neighbors + SPARE, self.num_pictures)
        self._scratch = Scratch(query_features.shape[1], 64 * self._num_candidates, budget, device)
        self._space = ProductSpace(query_features, gallery_features, device, self._scratch.chunk)
        self.distances = PairDistances(query_features, gallery_features, device)

    def blocks(self, start: int, stop: int) -> list[Tensor]:
        """The queries start..stop-1 in blocks (R,)."""
        return list(torch.arange(start, stop, device=self._device).split(self._scratch.max_queries))

    def block(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Exact distances (R, k) of `queries` (R,), ascending, and gallery rows (R, k); equals by gallery row."""
        return self._nearest(queries, *self._scan(queries)[:2])

    def block_with_farthest(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the distance (R,) of the farthest picture."""
        squared, candidates, farthest = self._scan(queries)
        return *self._nearest(queries, squared, candidates), self.distances(queries, farthest)

    def _nearest(self, queries: Tensor, squared: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest (R, k) from candidates (R, c) and their squared distances by a product."""
        distances, rows = self._exact(queries, candidates)
        if self._num_candidates == self.num_pictures:
            return distances, rows
        # k pictures are at most this far, so none of the k nearest is farther; seen through the error a second time.
        limit = squared[:, self._num_kept - 1] + 2 * self._space.error_bound(queries)
        unsure = (squared[:, -1] <= limit).nonzero().squeeze(1)
        if len(unsure):
            distances[unsure], rows[unsure] = self._within(queries[unsure], limit[unsure])
        return distances, rows

    def _exact(self, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest (R, k) among candidates (R, c), by exact distance and then by row."""
        candidates = candidates.sort(dim=1).values
        distances = self.distances(queries.repeat_interleave(candidates.shape[1]), candidates.flatten())
        distances, order = distances.view_as(candidates).sort(dim=1, stable=True)
        return distances[:, : self._num_kept], candidates.gather(1, order)[:, : self._num_kept]

    def _within(self, queries: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest (R, k) among all pictures whose squared distance by a product is at most `limit` (R,)."""
        best = limit.new_full((len(queries), self._num_kept), torch.inf)
        rows = torch.zeros_like(best, dtype=torch.int64)
        for pictures, squared in self._products(queries):
            near = squared <= limit[:, None]
            _merge(best, rows, near, lambda row, column: self.distances(queries[row], pictures[column]), pictures)  # noqa: B023
        return best, rows

    def _scan(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By products: the nearest's squared distances, ascending, and rows (R, c); the farthest's rows (R,)."""
        best = torch.full((len(queries), self._num_candidates), torch.inf, dtype=torch.float32, device=self._device)
        rows = torch.zeros_like(best, dtype=torch.int64)
        most, farthest = best.new_full((len(queries),), -torch.inf), torch.zeros_like(queries)
        for pictures, squared in self._products(queries):
            value, column = squared[:, : len(pictures)].max(1)
            farther = value > most
            most, farthest = torch.where(farther, value, most), torch.where(farther, pictures[column], farthest)
            if best.isinf().all() and len(pictures) >= best.shape[1]:  # all would be found
                best, column = squared.topk(best.shape[1], largest=False)
                rows = pictures[column]
                continue
            closer = squared < best[:, -1:]
            _merge(best, rows, closer, lambda row, column: squared[row, column], pictures)  # noqa: B023
        return best, rows, farthest

    def _products(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk after chunk, rows of pictures (n,) and the squared distances of `queries` to them (R, n or more)."""
        ones = torch.ones(len(queries), dtype=torch.float64, device=self._device)
        left = self._space.query_side(queries, 0 * ones, ones, 0.0)
        rows = torch.arange(self.num_pictures, device=self._device)
        for pictures in rows.split(self._scratch.chunk) if len(rows) else ():
            yield pictures, self._space.multiply(left, pictures, self._scratch)


def _merge(
    best: Tensor, rows: Tensor, found: Tensor, values: Callable[[Tensor, Tensor], Tensor], pictures: Tensor
) -> None:
    """Put the `found` (R, n) of a chunk of `pictures` (n,) among the best (R, c), ascending, and their rows (R, c).

    `values` gives the numbers to rank by of places (P,), (P,) in the chunk. Equals stay in the order of their coming.
    """
    for part in torch.arange(len(best), device=best.device).split(max(1, BATCH // found.shape[1])):
        row, column = found[part].nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(part))
        place = place_in_row(row, count)
        new = best.new_full((len(part), int(count.max())), torch.inf)
        new_rows = rows.new_zeros(new.shape)
        new[row, place], new_rows[row, place] = values(part[row], column), pictures[column]
        merged, order = torch.cat([best[part], new], dim=1).sort(dim=1, stable=True)
        best[part] = merged[:, : best.shape[1]]
        rows[part] = torch.cat([rows[part], new_rows], dim=1).gather(1, order)[:, : best.shape[1]]
