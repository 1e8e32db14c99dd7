"""k-reciprocal re-ranking (Zhong, Zheng, Cao, Li, CVPR 2017) on sparse neighbour lists: never N x N, never Q x G.

Every picture, query or gallery, is encoded as a sparse vector of weights on the pictures of its k-reciprocal
neighbourhood. The Jaccard distance of two such vectors needs only the entries that both have; where they share none
it is 1. So the new distance is the old one for nearly all pairs, shifted, and the ranking can be counted like a
ranking by distance, with few pairs lowered.

Weights are kept as whole numbers: their sums are exact, in any order, on any device and number of ranks.

Shape letters: N pictures, queries first, then gallery; Q queries, G gallery pictures; R pictures of a block, K = k1 + 1
neighbours (the picture itself among them), H = k1 / 2 + 1 of them, n pictures of a chunk, E entries, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.distances import PairDistances, full_precision
from ecn_dist.ranking.inputs import check_features, own_share
from ecn_dist.ranking.neighbors import MEMORY_BUDGET, NeighborSearch

ONE = 2**36  # the whole number that stands for weight 1


@dataclass(frozen=True)
class KReciprocal:
    """Settings of the re-ranking; the defaults are the paper's.

    k1: nearest neighbours that must be mutual; k2: nearest neighbours whose encodings are averaged (1: none);
    distance_weight: lambda, the share of the original distance in the result, above 0.
    """

    k1: int = 20
    k2: int = 6
    distance_weight: float = 0.3

    def __post_init__(self) -> None:
        if self.k1 < 1 or not 1 <= self.k2 <= self.k1 + 1 or not 0 < self.distance_weight <= 1:
            raise UserError(
                f"re-ranking with k1 {self.k1}, k2 {self.k2}, distance_weight {self.distance_weight}: "
                "k1 must be at least 1, k2 between 1 and k1 + 1, distance_weight above 0 and at most 1"
            )


@dataclass(frozen=True)
class SparseRows:
    """Rows of a sparse matrix of whole numbers, each row's columns ascending."""

    start: Tensor  # (rows + 1,) int64
    column: Tensor  # (E,) int64
    value: Tensor  # (E,) int64

    @classmethod
    def collect(cls, row: Tensor, column: Tensor, value: Tensor, num_rows: int, num_columns: int) -> "SparseRows":
        """From entries (E,) in any order; those of one place are added."""
        keys, where = torch.unique(row * num_columns + column, return_inverse=True)
        value = torch.zeros_like(keys).index_add_(0, where, value)
        row = keys // num_columns
        return cls(_starts(row, num_rows), keys - row * num_columns, value)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For `rows` (P,), all their entries: which of `rows` (E,) ascending, and places among the entries (E,)."""
        count = (self.start[1:] - self.start[:-1])[rows]
        which = torch.repeat_interleave(count)
        within = torch.arange(len(which), device=which.device) - (count.cumsum(0) - count)[which]
        return which, self.start[rows][which] + within


def _starts(row: Tensor, num_rows: int) -> Tensor:
    """(rows + 1,) where each row's entries start, of ascending row numbers (E,)."""
    return torch.nn.functional.pad(torch.bincount(row, minlength=num_rows).cumsum(0), (1, 0))


class Encodings:
    """The encodings of all pictures, and the farthest squared distance from each; the same on every rank."""

    def __init__(
        self, query_features: Tensor, gallery_features: Tensor, settings: KReciprocal, device: torch.device, budget: int
    ) -> None:
        """From whole features, the same on every rank. Collectives: gathers of neighbour lists and encodings."""
        features = torch.cat([query_features.to(gallery_features.device), gallery_features])
        self.num_queries, self.num_pictures = len(query_features), len(features)
        self.settings, self._device = settings, device
        own = own_share(self.num_pictures)
        search = NeighborSearch(features, features, settings.k1 + 1, device, budget)
        found = [search.block_with_farthest(queries) for queries in search.blocks(own.start, own.stop)]
        width = min(settings.k1 + 1, self.num_pictures)
        parts = list(zip(*found, strict=True)) or [(), (), ()]
        neighbors = torch.cat([torch.empty((0, width), dtype=torch.int64, device=device), *parts[1]])
        farthest = torch.cat([torch.empty(0, dtype=torch.float64, device=device), *parts[2]])
        self.neighbors_NK = distributed.all_gather_uneven_rows(neighbors)
        farthest = distributed.all_gather_uneven_rows(farthest).square()
        self.farthest = torch.where(farthest > 0, farthest, 1.0)  # of pictures all alike

        # Entries of a block are few; so many pictures that even the expanded lists keep to the budget.
        half = round(settings.k1 / 2) + 1
        block = max(1, budget // 4 // (8 * width * half * (width + 4)))
        rows = torch.arange(own.start, own.stop, device=device)
        own_rows = [self._encode(part, search.distances, half) for part in rows.split(block)]
        sparse = self._share(own_rows)
        if settings.k2 > 1:
            sparse = self._share([self._average(part, sparse) for part in rows.split(2 * block)])
        self.rows = sparse

    def _encode(self, rows: Tensor, distances: PairDistances, half: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and weight (E,) of the entries of pictures `rows` (R,), before averaging."""
        members = self._neighborhoods(rows, half)
        row, place = members.ge(0).nonzero(as_tuple=True)
        column = members[row, place]
        squared = distances(rows[row], column).square() / self.farthest[rows[row]]
        weight = (-squared).exp()
        total = weight.new_zeros(len(rows)).index_add_(0, row, weight)
        return rows[row], column, (weight / total[row] * ONE).round().long()

    def _neighborhoods(self, rows: Tensor, half: int) -> Tensor:
        """The expanded k-reciprocal neighbourhood of each of `rows` (R,): pictures (R, w) ascending, -1 elsewhere."""
        near_RK = self.neighbors_NK[rows]
        mutual_RK = (self.neighbors_NK[near_RK] == rows[:, None, None]).any(2)
        core_RK = torch.where(mutual_RK, near_RK, -1)
        # For each neighbour its own mutual neighbours, of half as many.
        theirs_RKH = self.neighbors_NK[near_RK][:, :, :half]
        back_RKHH = self.neighbors_NK[theirs_RKH][..., :half]
        theirs_RKH = torch.where((back_RKHH == near_RK[:, :, None, None]).any(3), theirs_RKH, -1)
        own_RKH = theirs_RKH >= 0
        shared_RKH = (theirs_RKH[..., None] == core_RK[:, None, None, :]).any(3) & own_RKH
        # Taken in where more than two thirds are in the core already.
        taken_RK = mutual_RK & (3 * shared_RKH.sum(2) > 2 * own_RKH.sum(2))
        more_RKH = torch.where(taken_RK[:, :, None], theirs_RKH, -1)
        members = torch.cat([core_RK, more_RKH.flatten(1)], dim=1).sort(dim=1).values
        members[:, 1:][members[:, 1:] == members[:, :-1]] = -1
        return members

    def _average(self, rows: Tensor, sparse: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the sums of the encodings of the k2 nearest of `rows` (R,)."""
        near = self.neighbors_NK[rows, : self.settings.k2]
        which, entry = sparse.expand(near.flatten())
        added = SparseRows.collect(
            which // near.shape[1], sparse.column[entry], sparse.value[entry], len(rows), self.num_pictures
        )
        row = torch.repeat_interleave(added.start[1:] - added.start[:-1])
        return rows[row], added.column, added.value

    def _share(self, parts: list[tuple[Tensor, Tensor, Tensor]]) -> SparseRows:
        """The rows of all ranks from this rank's entries, which ascend by row and column, as the ranks' rows do."""
        empty = torch.empty(0, dtype=torch.int64, device=self._device)
        columns = list(zip(*parts, strict=True)) or [(), (), ()]
        row, column, value = (distributed.all_gather_uneven_rows(torch.cat([empty, *part])) for part in columns)
        return SparseRows(_starts(row, self.num_pictures), column, value)

    @property
    def one(self) -> int:
        """The sum of a row's values, but for rounding."""
        return ONE * (min(self.settings.k2, self.neighbors_NK.shape[1]) if self.settings.k2 > 1 else 1)

    def jaccard(self, overlap: Tensor) -> Tensor:
        """Jaccard distances (...) float64 from sums of the smaller values of two rows, as in `overlaps`."""
        share = overlap.double() / self.one
        return 1 - share / (2 - share)

    def overlaps(self, queries: Tensor, pictures: Tensor) -> Tensor:
        """(R, n) int64: for query rows (R,) and gallery places (n,), the sums over columns of the smaller value."""
        which, entry = self.rows.expand(self.num_queries + pictures)
        order = self.rows.column[entry].argsort(stable=True)
        which, entry = which[order], entry[order]
        # The chunk by columns: which of its pictures have an entry there.
        by_column = SparseRows(_starts(self.rows.column[entry], self.num_pictures), which, self.rows.value[entry])
        total = torch.zeros((len(queries), len(pictures)), dtype=torch.int64, device=self._device)
        for first in range(0, len(queries), 256):  # few at a time: a column may have many pictures
            row, mine = self.rows.expand(queries[first : first + 256])
            meeting, theirs = by_column.expand(self.rows.column[mine])
            smaller = torch.minimum(self.rows.value[mine][meeting], by_column.value[theirs])
            place = (first + row[meeting]) * len(pictures) + by_column.column[theirs]
            total.view(-1).index_add_(0, place, smaller)
        return total

    def pair_overlaps(self, queries: Tensor, pictures: Tensor) -> Tensor:
        """(P,) int64: the same for single pairs of query rows (P,) and gallery places (P,)."""
        return torch.cat(
            [self._few_overlaps(*part) for part in zip(queries.split(8192), pictures.split(8192), strict=True)]
        )

    def _few_overlaps(self, queries: Tensor, pictures: Tensor) -> Tensor:
        left, mine = self.rows.expand(queries)
        right, theirs = self.rows.expand(self.num_queries + pictures)
        left = left * self.num_pictures + self.rows.column[mine]
        right = right * self.num_pictures + self.rows.column[theirs]
        place = torch.searchsorted(right, left).clamp_max(max(0, len(right) - 1))
        both = right[place] == left
        smaller = torch.minimum(self.rows.value[mine], self.rows.value[theirs][place])[both]
        total = torch.zeros(len(queries), dtype=torch.int64, device=self._device)
        return total.index_add_(0, left[both] // self.num_pictures, smaller)


class RerankedScore:
    """The re-ranked distance: (1 - lambda) Jaccard distance + lambda squared distance / the farthest from the query."""

    def __init__(self, encodings: Encodings, distances: PairDistances, first_position: int) -> None:
        """`first_position` is the place in the whole gallery of the first picture of `distances`."""
        self._encodings, self._distances, self._first = encodings, distances, first_position
        self._weight = encodings.settings.distance_weight

    def of_pairs(self, queries: Tensor, pictures: Tensor) -> Tensor:
        squared = self._distances(queries, pictures).square() / self._encodings.farthest[queries]
        jaccard = self._encodings.jaccard(self._encodings.pair_overlaps(queries, self._first + pictures))
        return (1 - self._weight) * jaccard + self._weight * squared

    def squared_distance(self, queries: Tensor, scores: Tensor) -> Tensor:
        return (scores - (1 - self._weight)) / self._weight * self._encodings.farthest[queries, None]

    def lowering(self, queries: Tensor, pictures: Tensor | slice) -> Tensor:
        if isinstance(pictures, slice):
            pictures = torch.arange(pictures.start, pictures.stop, device=queries.device)
        saved = 1 - self._encodings.jaccard(self._encodings.overlaps(queries, self._first + pictures))
        return saved * ((1 - self._weight) / self._weight * self._encodings.farthest[queries, None])


def rerank_distances(
    query_features: Tensor,
    gallery_features: Tensor,
    settings: KReciprocal | None = None,
    *,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """The whole table (Q, G) float32 of re-ranked distances, for galleries for which it fits into memory.

    Features are (Q, D) and (G, D) floats, the same on every rank; the work of the encoding is shared. For the metrics
    of large galleries `evaluate_ranking` takes the settings and makes no such table. Collectives: see `Encodings`.
    """
    settings = settings or KReciprocal()
    device = torch.device(device) if device is not None else torch.as_tensor(gallery_features).device
    with full_precision(device):
        check_features(query_features, gallery_features, gallery_sharded=False)
        query, gallery = torch.as_tensor(query_features).detach(), torch.as_tensor(gallery_features).detach()
        encodings = Encodings(query, gallery, settings, device, memory_budget)
        weight, everything = settings.distance_weight, torch.arange(len(gallery), device=device)
        table = torch.empty((len(query), len(gallery)), dtype=torch.float32, device=device)
        block = max(1, memory_budget // (32 * len(gallery) + 1))
        right = gallery.to(device, torch.float64)
        for rows in torch.arange(len(query), device=device).split(block):
            left = query[rows.to(query.device)].to(right)
            squared = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()
            jaccard = encodings.jaccard(encodings.overlaps(rows, everything))
            table[rows] = ((1 - weight) * jaccard + weight * squared / encodings.farthest[rows, None]).float()
        return table
