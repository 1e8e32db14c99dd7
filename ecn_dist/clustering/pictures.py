"""Features of unit length, whole or in parts on the ranks, and exact dot products of chosen pairs.

Letters: N pictures, n of them on this rank, D feature length, m pictures of a chunk, P pairs.
"""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.inputs import described, own_share

LENGTH_TOLERANCE = 0.01
MAX_BLOCK = 2048  # rows of a product
PAIRS_AT_A_TIME = 2**17  # numbers; two buffers of float64 stay in the processor's cache


class Pictures:
    """The pictures whose work is this rank's: those it was given, or its share of what all ranks were given."""

    def __init__(self, features: Tensor, sharded: bool, memory_budget: int) -> None:
        """A chunk's product with MAX_BLOCK pictures, and its features, fit into the budget (bytes).

        Collectives: gathers of errors and sizes; a `UserError` on every rank if anything does not fit.
        """
        features = torch.as_tensor(features).detach()
        error = None
        if features.ndim != 2 or not features.is_floating_point():
            error = f"features must be floats of shape (pictures, length), not {described(features)}"
        distributed.raise_together(error)
        shapes = distributed.gather_objects((*features.shape, features.dtype))
        if len({shape[1:] if sharded else shape for shape in shapes}) > 1:
            given = "; ".join(f"rank {rank}: {n} of length {d}, {dtype}" for rank, (n, d, dtype) in enumerate(shapes))
            raise UserError(f"the ranks' features do not fit together: {given}", on_all_ranks=True)
        # Where the parts begin that `chunks` takes side by side, and the end of the last.
        self._starts = [0, *accumulate(shape[0] for shape in (shapes if sharded else shapes[:1]))]
        self._held, self._is_sharded, self._device = features, len(self._starts) > 2, features.device
        self.total, self.dim = self._starts[-1], features.shape[1]
        self.chunk_size = max(16, memory_budget // (16 * MAX_BLOCK + 16 * self.dim) // 16 * 16)
        share = slice(0, len(features)) if sharded else own_share(self.total)
        self.first = self._starts[distributed.rank()] if sharded else share.start
        self.own = features[share]
        self.squares = self._pair_dots(self.own, self.own, *2 * [torch.arange(len(self.own), device=self._device)])
        lengths = self.squares.sqrt()
        wrong = (~((lengths - 1).abs() <= LENGTH_TOLERANCE)).nonzero()  # so written, NaN is wrong too
        error = None if self.total else "there are no pictures to cluster"
        if len(wrong):
            row = int(wrong[0])
            error = f"features must be of length 1; that of picture {self.first + row} is {float(lengths[row]):.4g}"
            error += ". Normalise them" if lengths[row].isfinite() else ". Check the network"
        distributed.raise_together(error)

    @property
    def ids(self) -> Tensor:
        """(n,) int64: the numbers of this rank's pictures among all."""
        return torch.arange(self.first, self.first + len(self.own), device=self._device)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All pictures, about `chunk_size` at a time: numbers (m,) int64 and features (m, D).

        Collective where the features are in parts: an all-gather for each chunk, of the next while this one is used.
        """
        starts = torch.tensor(self._starts, device=self._device)
        firsts, ends = starts[:-1, None], starts[1:, None]
        longest = int((ends - firsts).max())
        share = min(max(1, self.chunk_size // len(firsts)), longest)
        pending = self._start_gather(0, share)
        for start in range(0, longest, share):
            features = pending.wait()
            if start + share < longest:
                pending = self._start_gather(start + share, share)
            numbers = firsts + torch.arange(start, start + share, device=self._device)
            there, numbers = (numbers < ends).flatten(), numbers.flatten()
            yield (numbers, features) if there.all() else (numbers[there], features[there])

    def _start_gather(self, start: int, share: int) -> distributed.PendingRows:
        part = self._held[start : start + share]
        padding = part.new_zeros((share - len(part), self.dim))
        part = torch.cat([part, padding]) if len(padding) else part
        return distributed.start_all_gather_rows(part) if self._is_sharded else distributed.PendingRows(part, None)

    def dots(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """(P,) float64 dot products of this rank's `rows` (P,) with the pictures of these `numbers` (P,).

        A pair's bits do not depend on the ranks, nor on the pairs it is asked with. Collective where the features are
        in parts, as `chunks`.
        """
        if not self._is_sharded:
            return self._pair_dots(self.own, self._held, rows, numbers)
        result = torch.empty(len(rows), dtype=torch.float64, device=self._device)
        place = torch.full((self.total,), -1, dtype=torch.int64, device=self._device)
        for there, features in self.chunks():
            place[there] = torch.arange(len(there), device=self._device)
            pairs = (place[numbers] >= 0).nonzero().squeeze(1)
            result[pairs] = self._pair_dots(self.own, features, rows[pairs], place[numbers[pairs]])
            place[there] = -1
        return result

    def _pair_dots(self, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Each pair's dot product, in one buffer of fixed shape, so that all are summed up in the same order."""
        result = torch.empty(len(rows), dtype=torch.float64, device=self._device)
        slots = max(1, (PAIRS_AT_A_TIME if self._device.type == "cpu" else 2**26) // self.dim)
        products = torch.zeros((slots, self.dim), dtype=torch.float64, device=self._device)
        for start in range(0, len(rows), slots):
            part = slice(start, start + slots)
            few = products[: len(rows[part])]
            few.copy_(left.index_select(0, rows[part]))
            few.mul_(right.index_select(0, columns[part]))
            result[part] = products.sum(1)[: len(few)]
        return result


def exact_products(left: Tensor, right: Tensor) -> Tensor:
    """(R, D) and (m, D) of lengths of about 1 -> their dot products (R, m) float64, rounded once.

    The features are cut into a part on a grid of 2^-26 and the rest on one of 2^-46: products of parts, and sums of
    such products, fit into float64, so that BLAS may add them in any order. Equal features give equal bits.
    """
    (left_high, left_low), (right_high, right_low) = _halves(left), _halves(right)
    cross = torch.cat([left_high, left_low], 1) @ torch.cat([right_low, right_high], 1).T
    return left_high @ right_high.T + (cross + left_low @ right_low.T)


def _halves(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    high = (features * 2.0**26).round() / 2.0**26
    return high, ((features - high) * 2.0**46).round() / 2.0**46
