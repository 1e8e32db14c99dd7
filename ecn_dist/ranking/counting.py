"""How many gallery pictures are closer to a query than each of its true matches: exact, no sort, no Q x G matrix.

A chunk of the gallery is multiplied with a block of queries, and every entry (an approximate squared distance) looked
up in a table of its query: the line of distances is cut into fine buckets, and one that no true match is near (within
the product's error) says at once how many true matches are closer. Pictures in the other buckets, about one in a
hundred, are placed by a search; those still within the error of a match have their exact score computed.

Shape letters: R queries of a block, G gallery pictures on this rank, n pictures of a chunk, C groups of the gallery
(cameras, or one), T true matches of the query that has most (the others are padded), B buckets, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.ranking.distances import BATCH, UNIT_ROUNDOFF, PairDistances, ProductSpace
from ecn_dist.ranking.inputs import Labels, place_in_row

MARGIN = 2.0  # buckets before the closest and after the farthest true match, so that the outermost are never near one


@dataclass(frozen=True)
class TrueMatches:
    """The true matches of a block of queries, from all ranks, in ranked order: by score, equals in gallery order."""

    score: Tensor  # (R, T) float64, infinite where a query has fewer than T
    position: Tensor  # (R, T) int64, place in the whole gallery
    camera: Tensor  # (R, T) int64
    count: Tensor  # (R,) int64

    @property
    def valid(self) -> Tensor:
        """(R, T) bool: not padding."""
        return torch.arange(self.score.shape[1], device=self.count.device) < self.count[:, None]

    @classmethod
    def gather(
        cls, labels: Labels, queries: Tensor, pairs: tuple[Tensor, Tensor], score: PairDistances, first_position: int
    ) -> "TrueMatches":
        """Score the true ones among this rank's `pairs` of one identity, and share them. Two all-gathers."""
        places, pictures = pairs
        true = labels.gallery_cameras[pictures] != labels.query_cameras[queries[places]]
        places, pictures = places[true], pictures[true]
        scores = distributed.all_gather_uneven_rows(score.of_pairs(queries[places], pictures))
        facts = torch.stack([places, first_position + pictures, labels.gallery_cameras[pictures]], dim=1)
        facts = distributed.all_gather_uneven_rows(facts)
        order = facts[:, 1].argsort()
        for key in (scores, facts[:, 0]):
            order = order[key[order].argsort(stable=True)]
        place, *others = facts[order].unbind(1)
        count = torch.bincount(place, minlength=len(queries))
        shape = len(queries), int(count.max())
        at = place, place_in_row(place, count)
        sorted_scores = scores.new_full(shape, torch.inf).index_put(at, scores[order])
        position, camera = (place.new_zeros(shape).index_put(at, values) for values in others)
        return cls(sorted_scores, position, camera, count)

    def of_camera(self, camera: int, counts: Tensor) -> tuple["TrueMatches", Tensor]:
        """Those that one camera has seen, in order, and the `counts` (3, R, T) that belong to them."""
        mine = self.valid & (self.camera == camera)
        count = mine.sum(1)
        kept = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]
        score, position, seen_by = (values.gather(1, kept) for values in (self.score, self.position, self.camera))
        matches = TrueMatches(score, position, seen_by, count)
        return matches, torch.stack([table.gather(1, kept) for table in counts])


class Buckets:
    """The lines of a block's queries, cut at its true matches; a distance² x lies at MARGIN + scale (x - origin).

    Of the true matches' squared distances (R, T), those of them that are `valid`, the product's error (R,), and B, the
    length of every line.
    """

    def __init__(self, squared: Tensor, valid: Tensor, error: Tensor, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        rows, self.num_matches = squared.shape
        last = squared.masked_fill(~valid, -torch.inf).amax(1)
        self.origin = squared[:, 0] - 2 * error
        self.scale = (num_buckets - 3 * MARGIN) / (last + 2 * error - self.origin)
        # The error on the line (R, 1); the second term is the rounding of a place itself.
        self.reach = reach = (self.scale * error + 4 * UNIT_ROUNDOFF * num_buckets)[:, None]
        line = MARGIN + self.scale[:, None] * (squared - self.origin[:, None])
        line = torch.where(valid, line, float(num_buckets))

        self.codes_per_row = 2 * self.num_matches + 2
        first_near = (line - reach).floor().long().clamp(0, num_buckets)
        after_near = (line + reach).floor().long().clamp(-1, num_buckets - 1) + 1
        ones = valid.to(torch.int32)
        delta = ones.new_zeros((rows, num_buckets + 1))
        below = delta.scatter_add(1, after_near, ones).cumsum(1, dtype=torch.int32)[:, :-1]
        near = delta.scatter_add(1, first_near, ones).cumsum(1, dtype=torch.int32)[:, :-1] > below
        row = torch.arange(rows, device=squared.device, dtype=torch.int32)[:, None]
        # Code of a bucket: twice the number of matches below it, plus 1 where a match is near; numbered on over rows.
        self._codes = (2 * below + near + self.codes_per_row * row).flatten()
        self._first_bucket = num_buckets * row

        # Ends of the stretches near each match, on one line for all rows. Overlapping ones put the ends out of order,
        # but a search still stops where no stretch is around if its place is even: ends of one kind are in order.
        ends = torch.stack([line - reach, line + reach], dim=2).flatten(1).clamp(0.0, float(num_buckets))
        self._ends = (ends + num_buckets * row).flatten()

    def lookup(self, line: Tensor) -> Tensor:
        """The codes of places (R, n) on the lines, flat (R n,) int32. Overwrites `line`."""
        buckets = line.clamp_(0, self.num_buckets - 1).to(torch.int32).add_(self._first_bucket)
        return torch.index_select(self._codes, 0, buckets.flatten())

    def search(self, row: Tensor, line: Tensor) -> Tensor:
        """The codes, without the numbering over rows, of single places (P,) on the lines of `row` (P,)."""
        place = torch.searchsorted(self._ends, line.double() + self.num_buckets * row, right=True)
        return place - 2 * self.num_matches * row


Watch = Callable[[Tensor, Buckets, Tensor, Tensor], None]


class GalleryScan:
    """This rank's gallery in the order in which it is multiplied with queries: chunk after chunk, each of one group."""

    def __init__(self, space: ProductSpace, score: PairDistances, groups: Tensor, num_groups: int, first: int) -> None:
        """A gallery whose pictures are in `groups` (G,) 0..C-1, `first` being the place of its first in the whole."""
        self.space, self.score, self.num_groups, self.first = space, score, num_groups, first
        order = groups.argsort(stable=True)
        self._place = order.argsort()  # (G,) of each row in the order of the chunks
        by_group = order.split(torch.bincount(groups, minlength=num_groups).tolist())
        chunks = ((group, rows) for group, all_rows in enumerate(by_group) for rows in all_rows.split(space.chunk))
        self._chunks = [(group, rows) for group, rows in chunks if len(rows)]

    def count(
        self, queries: Tensor, matches: TrueMatches, left_out: tuple[Tensor, Tensor], watch: Watch | None
    ) -> Tensor:
        """For each true match of `queries` (R,), this rank's pictures of each group before it: (3, C, R, T) int64.

        Counted three ways: closer; as close or closer; closer, or as close and earlier in the gallery. `left_out` are
        places in `queries` and gallery rows, both (P,): the true matches themselves and the junk. `watch` is shown
        every product: places on the lines (R, n), infinite where there is no pair to count; the lines; gallery rows;
        query rows (R,).
        """
        out_row, out_place = left_out[0], self._place[left_out[1]]
        squared = self.score.squared_distance(queries, matches.score) * self.space.factor**2
        # Beside the product's error, the rounding of a large origin and of a lowered place.
        largest = squared.masked_fill(~matches.valid, 0.0).abs().amax(1)
        error = self.space.error_bound(queries) + 4 * UNIT_ROUNDOFF * largest
        lines = Buckets(squared, matches.valid, error, num_buckets(matches.score.shape[1]))
        left = self.space.query_side(queries, lines.origin, lines.scale, MARGIN)
        shape = (self.num_groups, len(queries))
        codes = squared.new_zeros((shape[0], shape[1] * lines.codes_per_row), dtype=torch.int64)
        exact = squared.new_zeros((3, *shape, lines.num_matches + 1), dtype=torch.int64)
        last = 0
        for group, pictures in self._chunks:
            first, last = last, last + len(pictures)
            line = self.space.multiply(left, pictures)
            lowering = self.score.lowering(queries, pictures)
            if lowering is not None:
                line[:, : len(pictures)] -= lowering * (self.space.factor**2 * lines.scale[:, None])
            is_here = (out_place >= first) & (out_place < last)
            line[out_row[is_here], out_place[is_here] - first] = torch.inf
            if watch is not None:
                watch(line, lines, pictures, queries)
            code = lines.lookup(line)
            codes[group] += torch.bincount(code, minlength=codes.shape[1])
            unsure = code.bitwise_and_(1).bool().nonzero().squeeze(1)
            for entries in unsure.split(BATCH):
                row = entries // line.shape[1]
                code = lines.search(row, line.flatten()[entries])
                codes[group] += torch.bincount(code + lines.codes_per_row * row, minlength=codes.shape[1])
                near = code.bitwise_and(1).bool()
                row, column = row[near], (entries - row * line.shape[1])[near]
                picture = pictures[column]
                scores = self.score.of_pairs(queries[row], picture)
                _add_exact(exact[:, group], matches, row, scores, self.first + picture)
        # An even code is that of pictures between matches; odd ones were placed by their exact score.
        sure = codes.view(*shape, -1)[:, :, ::2]
        return (exact + sure).cumsum(3)[..., :-1]


def num_buckets(num_true: int) -> int:
    """Some for each true match, so that few pictures fall into a bucket that is near one."""
    return min(2**15, max(2**10, 2 ** (32 * num_true - 1).bit_length()))


def _add_exact(counts: Tensor, matches: TrueMatches, row: Tensor, scores: Tensor, position: Tensor) -> None:
    """Add pictures (P,) to `counts` (3, R, T + 1) in the bin of the number of matches that stay before each."""
    width = matches.score.shape[1]
    for part in torch.arange(len(row), device=row.device).split(max(1, BATCH // width)):
        line, score = matches.score[row[part]], scores[part, None]
        closer, or_equal = (torch.searchsorted(line, score, right=right).squeeze(1) for right in (False, True))
        earlier = (line == score) & (matches.position[row[part]] < position[part, None])
        for bins, place in zip(counts, (or_equal, closer, closer + earlier.sum(1)), strict=True):
            bins.index_put_((row[part], place), place.new_ones(()), accumulate=True)
