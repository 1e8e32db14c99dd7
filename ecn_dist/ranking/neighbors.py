"""The nearest pictures of each row: exact, in bounded memory, never all distances. And query expansion by them.

Products propose candidates, a few more than asked for, whose distances are computed exactly. Where more pictures lie
within the product's error of the last neighbour, as equal ones do, a second pass computes the distances of them all.

Shape letters: Q queries, R rows of a block, G gallery pictures, n pictures of a chunk, k neighbours, c candidates.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.distances import BATCH, MEMORY_BUDGET, PairDistances, ProductSpace, full_precision
from ecn_dist.ranking.inputs import check_features, first_of_part, place_in_row

SPARE = 12  # candidates beyond k: if no more pictures lie within the product's error of the k-th, one pass is enough
MANY = 2  # times c: if more are near, they are thinned out by a top-k before they are sorted


def nearest_pictures(
    query_features: Tensor,
    gallery_features: Tensor,
    num_neighbors: int,
    *,
    gallery_sharded: bool = False,
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
    device = torch.as_tensor(gallery_features).device
    with full_precision(device):
        query, gallery, first = check_features(query_features, gallery_features, gallery_sharded)
        num_neighbors = min(num_neighbors, int(distributed.all_reduce(torch.tensor(len(gallery)))))
        search = NeighborSearch(query, gallery, num_neighbors, device, memory_budget)
        distances, pictures, _ = search.of(torch.arange(len(query), device=device))
        # Each rank's nearest side by side.
        missing = (0, num_neighbors - distances.shape[1])
        distances = torch.nn.functional.pad(distances, missing, value=torch.inf)
        pictures = torch.nn.functional.pad(pictures + first, missing)
        parts = (distributed.all_gather_rows(values[None]) for values in (distances, pictures))
        distances, pictures = (values.transpose(0, 1).flatten(1) for values in parts)
        return in_order(distances, pictures, num_neighbors)


def expand_queries(
    query_features: Tensor, gallery_features: Tensor, num_neighbors: int = 5, *, gallery_sharded: bool = False
) -> Tensor:
    """Average query expansion (Chum et al., ICCV 2007): each query becomes the mean of itself and its nearest pictures.

    Features are (Q, D) and (G, D) floats; returns (Q, D) of length 1 in the query's type and on its device, for
    `evaluate_ranking` with the same gallery. Labels are not looked at: pictures of the query's own camera count like
    others. `gallery_sharded`, errors and collectives as in `nearest_pictures`; with it, a sum of (Q, D) as well.
    """
    _, places = nearest_pictures(query_features, gallery_features, num_neighbors, gallery_sharded=gallery_sharded)
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
    return torch.nn.functional.normalize(mean).to(query_features.dtype)


class Nearest:
    """Of each of some rows the `count` pictures nearest to it among all that were shown, ascending; equals by number.

    `values` (rows, count) are distances of any kind, of the type of `like`, infinite where fewer pictures were shown;
    `numbers` are those of the pictures, -1 where there is none.
    """

    def __init__(self, rows: int, count: int, like: Tensor) -> None:
        self.values = like.new_full((rows, count), torch.inf)
        self.numbers = torch.full((rows, count), -1, dtype=torch.int64, device=like.device)

    def show(self, first: int, values: Tensor, numbers: Tensor) -> None:
        """Distances `values` (R, n) of the rows from `first` on to pictures `numbers` (n,); infinite: left out."""
        step = max(1, (BATCH if values.device.type == "cpu" else 64 * BATCH) // values.shape[1])
        for start in range(0, len(values), step):
            shown, rows = values[start : start + step], slice(first + start, first + min(start + step, len(values)))
            best, kept = self.values[rows], self.numbers[rows]
            worst, last = best[:, -1], kept[:, -1]
            near = shown <= worst[:, None]
            if best.shape[1] < shown.shape[1] and int(near.count_nonzero()) > MANY * best.numel():  # at first; then few
                near &= shown <= shown.topk(best.shape[1], largest=False, sorted=False).values.amax(1, keepdim=True)
            row, column = near.nonzero(as_tuple=True)
            found, number = shown[row, column], numbers[column]
            closer = (found < worst[row]) | (number < last[row])
            row, found, number = row[closer], found[closer], number[closer]
            if not len(row):
                continue
            count = torch.bincount(row, minlength=len(best))
            place, width = place_in_row(row, count) + best.shape[1], int(count.max())
            all_values = torch.nn.functional.pad(best, (0, width), value=torch.inf)
            all_numbers = torch.nn.functional.pad(kept, (0, width), value=-1)
            all_values[row, place], all_numbers[row, place] = found, number
            self.values[rows], self.numbers[rows] = in_order(all_values, all_numbers, best.shape[1])


def in_order(values: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` lowest of each row of `values`, ascending, equals by number; and their numbers. Both (R, any)."""
    numbers, by_number = numbers.sort(dim=1)
    values, by_value = values.gather(1, by_number).sort(dim=1, stable=True)
    return values[:, :count], numbers.gather(1, by_value)[:, :count]


class NeighborSearch:
    """Nearest pictures of blocks of queries in a gallery on this rank. All ranks make it together (`ProductSpace`)."""

    def __init__(self, query: Tensor, gallery: Tensor, num_neighbors: int, device: torch.device, budget: int) -> None:
        self.num_pictures, self._device = len(gallery), device
        self._num_kept = min(num_neighbors, self.num_pictures)
        self._num_candidates = min(num_neighbors + SPARE, self.num_pictures)
        self._space = ProductSpace(query, gallery, device, 64 * self._num_candidates, budget)
        self.distances = PairDistances(query, gallery, device)

    def of(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact distances (R, k) of `queries` (R,), ascending, and gallery rows (R, k); equals by gallery row.

        And the gallery row of the farthest picture (R,), by a product.
        """
        blocks = zip(*map(self._block, queries.split(self._space.max_queries)), strict=True)
        distances, rows, farthest = map(torch.cat, blocks)
        return distances, rows, farthest

    def _block(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = Nearest(len(queries), self._num_candidates, torch.empty(0, dtype=torch.float32, device=self._device))
        most = nearest.values.new_full((len(queries),), -torch.inf)
        farthest = torch.zeros_like(queries)
        for pictures, squared in self._products(queries):
            nearest.show(0, squared, pictures)
            value, column = squared.max(1)
            farther = value > most
            most, farthest = torch.where(farther, value, most), torch.where(farther, pictures[column], farthest)
        exact = self.distances(queries.repeat_interleave(self._num_candidates), nearest.numbers.flatten())
        distances, rows = in_order(exact.view_as(nearest.values), nearest.numbers, self._num_kept)
        if self._num_candidates < self.num_pictures:
            # k pictures are at most this far, so none of the k nearest is farther; twice the error by the product.
            limit = nearest.values[:, self._num_kept - 1] + 2 * self._space.error_bound(queries)
            unsure = (nearest.values[:, -1] <= limit).nonzero().squeeze(1)
            for some in unsure.split(max(1, BATCH // self._space.chunk)):
                distances[some], rows[some] = self._within(queries[some], limit[some])
        return distances, rows, farthest

    def _within(self, queries: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest (R, k) among all pictures whose squared distance by a product is at most `limit` (R,)."""
        nearest = Nearest(len(queries), self._num_kept, limit)
        for pictures, squared in self._products(queries):
            row, column = (squared <= limit[:, None]).nonzero(as_tuple=True)
            exact = limit.new_full(squared.shape, torch.inf)
            exact[row, column] = self.distances(queries[row], pictures[column])
            nearest.show(0, exact, pictures)
        return nearest.values, nearest.numbers

    def _products(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk after chunk, rows of pictures (n,) and the squared distances of `queries` to them (R, n)."""
        ones = torch.ones(len(queries), dtype=torch.float64, device=self._device)
        left = self._space.query_side(queries, 0 * ones, ones, 0.0)
        rows = torch.arange(self.num_pictures, device=self._device)
        for pictures in rows.split(self._space.chunk) if len(rows) else ():
            yield pictures, self._space.multiply(left, pictures)[:, : len(pictures)]
