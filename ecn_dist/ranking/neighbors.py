"""The nearest gallery pictures of each query: exact, in bounded memory, no Q x G matrix.

Products propose candidates, a few more than asked for; the distances of the candidates are computed exactly. Where
more pictures than these lie within the product's error of the last neighbour, as equal ones do, a second pass computes
the distances of all of them.

Shape letters: Q queries, R queries of a block, G gallery pictures, n pictures of a chunk, k neighbours, c candidates.
"""

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.distances import PairDistances, ProductSpace, Scratch, full_precision
from ecn_dist.ranking.inputs import check_features

SPARE = 12  # candidates beyond k: if no more pictures lie within the product's error of the k-th, one pass is enough
BATCH = 2**19  # entries of a product that a second pass takes at a time: at times all are near enough
MEMORY_BUDGET = 256 * 2**20


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
        distances = distributed.all_gather_rows(pad_columns(distances, num_neighbors, torch.inf)[None])
        pictures = distributed.all_gather_rows(pad_columns(pictures + first, num_neighbors, 0)[None])
        distances, pictures = (values.transpose(0, 1).flatten(1) for values in (distances, pictures))
        distances, order = distances.sort(dim=1, stable=True)
        total = int(distributed.all_reduce(torch.tensor(len(gallery))))
        kept = slice(0, min(num_neighbors, total))
        return distances[:, kept], pictures.gather(1, order)[:, kept]


def pad_columns(values: Tensor, width: int, padding: float) -> Tensor:
    """(R, w) widened to (R, `width`) at least."""
    return torch.nn.functional.pad(values, (0, max(0, width - values.shape[1])), value=padding)


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
        limit = squared.kthvalue(self._num_kept, dim=1).values + 2 * self._space.error_bound(queries)
        unsure = (squared.amax(1) <= limit).nonzero().squeeze(1)
        if len(unsure):
            distances[unsure], rows[unsure] = self._within(queries[unsure], limit[unsure])
        return distances, rows

    def _within(self, queries: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest (R, k) among all pictures whose squared distance by a product is at most `limit` (R,)."""
        best = limit.new_full((len(queries), self._num_kept), torch.inf)
        rows = torch.zeros_like(best, dtype=torch.int64)
        left = self._query_side(queries)
        for first in range(0, self.num_pictures, self._scratch.chunk):
            last = min(first + self._scratch.chunk, self.num_pictures)
            near = self._space.multiply(left, slice(first, last), self._scratch) <= limit[:, None]
            for part in torch.arange(len(queries), device=self._device).split(max(1, BATCH // near.shape[1])):
                row, column = near[part].nonzero(as_tuple=True)
                new, place = _side_by_side(row, self.distances(queries[part][row], first + column), len(part))
                new_rows = rows.new_zeros(new.shape)
                new_rows[row, place] = first + column
                # Pictures come in gallery order, and the sort is stable.
                best[part], order = _first(torch.cat([best[part], new], dim=1), self._num_kept)
                rows[part] = torch.cat([rows[part], new_rows], dim=1).gather(1, order)
        return best, rows

    def _query_side(self, queries: Tensor) -> Tensor:
        """Left factor of the products that are squared distances as they are."""
        ones = torch.ones(len(queries), dtype=torch.float64, device=self._device)
        return self._space.query_side(queries, 0 * ones, ones, 0.0)

    def _scan(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By products: the nearest pictures' squared distances and rows (R, c), and the farthest's rows (R,)."""
        left = self._query_side(queries)
        best = torch.full((len(queries), self._num_candidates), torch.inf, dtype=torch.float32, device=self._device)
        rows = torch.zeros((len(queries), self._num_candidates), dtype=torch.int64, device=self._device)
        most, farthest = best.new_full((len(queries),), -torch.inf), torch.zeros_like(queries)
        for first in range(0, self.num_pictures, self._scratch.chunk):
            last = min(first + self._scratch.chunk, self.num_pictures)
            squared = self._space.multiply(left, slice(first, last), self._scratch)
            value, column = squared[:, : last - first].max(1)
            farthest = torch.where(value > most, first + column, farthest)
            most = torch.maximum(value, most)
            best, rows = _merge(best, rows, squared, first)
        return best, rows, farthest

    def _exact(self, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        candidates = candidates.sort(dim=1).values  # so that the stable sort below leaves equals in gallery order
        distances = self.distances(queries.repeat_interleave(candidates.shape[1]), candidates.flatten()).view(
            candidates.shape
        )
        distances, order = _first(distances, self._num_kept)
        return distances, candidates.gather(1, order)


def _first(distances: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The smallest (R, `number`), ascending, and their columns; equals in the order in which they stand."""
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :number], order[:, :number]


def _side_by_side(row: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Values (P,) of ascending rows (P,) as a table (R, w), padded with infinity, and their columns (P,) in it."""
    count = torch.bincount(row, minlength=num_rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    table = values.new_full((num_rows, int(count.max())), torch.inf)
    table[row, place] = values
    return table, place


def _merge(best: Tensor, rows: Tensor, squared: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Put what is closer in a product (R, n) among the best (R, c), in no order, with their gallery rows (R, c)."""
    width = squared.shape[1]
    if first == 0 and width >= best.shape[1]:  # nothing to merge with, and everything would be found
        best, rows = squared.topk(best.shape[1], largest=False, sorted=False)
        return best, rows
    found = (squared < best.amax(1, keepdim=True)).flatten().nonzero().squeeze(1)
    row = found // width
    new, place = _side_by_side(row, squared.flatten()[found], len(best))
    new_rows = rows.new_zeros(new.shape)
    new_rows[row, place] = first + found - row * width
    best, order = torch.cat([best, new], dim=1).topk(best.shape[1], largest=False, sorted=False)
    return best, torch.cat([rows, new_rows], dim=1).gather(1, order)
