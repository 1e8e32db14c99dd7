"""Distances between features: exact for chosen pairs, and approximate with a bound on the error by a float32 product.

The last bits of a float32 product depend on its shape and on the machine, and small distances between long vectors
cancel in it. So it only decides what its error cannot change; the few pairs left are computed from the features'
difference in float64.

Shape letters: Q queries, R queries of a block, G gallery pictures on this rank, D feature length, P pairs, n pictures
of a chunk, T true matches of the query that has most.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ecn_dist import distributed

UNIT_ROUNDOFF = 2.0**-24  # of float32
# Of a computed squared distance beside its dot product: of shift, scale and factors, and of the sum of three terms.
ROUNDINGS = 10.0
TERMS = 256  # of a dot product in one call of BLAS: a long sum is less exact, and leaves more pairs to exact distances
NORM_TERMS = 64  # of a norm, summed up in float32; these sums are added in float64
SAMPLE = 4096  # pictures whose mean is near enough to that of all
ALIGNMENT = 16  # columns of a product; BLAS libraries take half as long again for a result whose rows are not aligned
MAX_BLOCK = 2048  # queries; more gain nothing
MEMORY_BUDGET = 256 * 2**20  # bytes
BATCH = 2**19  # entries of a product looked at singly at a time: at times, as with equal features, all are
BYTES_PER_ENTRY = 24  # of a product, with all that is derived from it


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 products are float32: no TF32, no bfloat16 passes, no autocast. And no gradients."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


class PairDistances:
    """Exact Euclidean distances of chosen pairs: float64, from differences, equal to the last bit for equal features.

    The pairs go through one buffer of fixed shape, so that a pair's bits depend on no rank, chunk or order. A gallery
    is ranked by `of_pairs`, the lower the better: the distances, or in a subclass what rises with a squared distance
    that some pairs have lowered.
    """

    def __init__(self, query: Tensor, gallery: Tensor, device: torch.device) -> None:
        self._sources = (query, gallery)
        dim = query.shape[1]
        width = -(-dim // 8) * 8  # rows of whole vector registers: every row is summed in the same order
        slots = (2**20 if device.type == "cpu" else 2**27) // (8 * width) or 1  # in the processor's cache
        self._rows = [source.new_empty((slots, dim)) for source in self._sources]
        self._difference = torch.zeros((slots, width), dtype=torch.float64, device=device)

    def __call__(self, queries: Tensor, pictures: Tensor) -> Tensor:
        """Query rows (P,) and gallery rows (P,), int64 -> distances (P,) float64 on the device of computation."""
        distances, slots = self._difference.new_empty(len(queries)), len(self._difference)
        for start in range(0, len(queries), slots):
            part = slice(start, start + slots)
            left, right = (rows[: len(queries[part])] for rows in self._rows)
            for source, chosen, rows in zip(self._sources, (queries, pictures), (left, right), strict=True):
                torch.index_select(source, 0, chosen[part].to(source.device), out=rows)
            difference = self._difference[: len(left), : left.shape[1]]
            difference.copy_(left).sub_(right.to(difference.device))
            distances[part] = torch.linalg.vector_norm(self._difference, dim=1)[: len(left)]
        return distances

    def of_pairs(self, queries: Tensor, pictures: Tensor) -> Tensor:
        """The exact scores (P,) float64 of query rows (P,) and gallery rows (P,) of this rank."""
        return self(queries, pictures)

    def squared_distance(self, queries: Tensor, scores: Tensor) -> Tensor:
        """The squared distances (R, T) from `queries` (R,) that have these scores (R, T) where nothing is lowered."""
        return scores.square()

    def lowering(self, queries: Tensor, pictures: Tensor) -> Tensor | None:
        """By how much the squared distance of each pair is lowered, (R, n) float64; None: nothing is."""
        return None


class ProductSpace:
    """Features shifted to about mean 0 and scaled to norms of at most 1, for squared distances by a product.

    What all features share only costs precision. A distance times `factor` is one in these units. At most `max_queries`
    meet at most `chunk` pictures in a product: buffers and `bytes_per_query` of what a caller keeps stay within a
    `budget` of bytes. Collectives: two small all-reduces when it is made; where features are not finite every rank
    raises a `UserError`.
    """

    def __init__(self, query: Tensor, gallery: Tensor, device: torch.device, bytes_per_query: int, budget: int) -> None:
        self._query, self._gallery, self._device = query, gallery, device
        self.dim = query.shape[1]
        self.max_queries = max(1, min(MAX_BLOCK, budget // 2 // (bytes_per_query + 16 * self.dim)))
        chunk = budget // 2 // (8 * self.dim + BYTES_PER_ENTRY * self.max_queries)
        self.chunk = max(ALIGNMENT, chunk // ALIGNMENT * ALIGNMENT)
        self._side = torch.zeros((self.chunk, self.dim + 2), dtype=torch.float32, device=device)
        self._product = torch.zeros(self.max_queries * self.chunk, dtype=torch.float32, device=device)
        sample = gallery[:: len(gallery) // SAMPLE + 1].to(device)
        total = torch.nn.functional.pad(sample.sum(0, dtype=torch.float64), (0, 1), value=len(sample))
        total = distributed.all_reduce(total)
        self._offset = total[:-1] / total[-1]
        self._query_norms, self._gallery_norms = self._norms(query), self._norms(gallery)
        largest = torch.stack([norms.max() for norms in (self._query_norms, self._gallery_norms) if len(norms)]).max()
        if distributed.any_rank(not torch.isfinite(largest)):
            bad = None
            for name, features in (("gallery", gallery), ("query", query)):
                if len(rows := (~torch.isfinite(features).all(1)).nonzero()):
                    bad = f"{name} features are not finite, first in row {int(rows[0])}; check the network"
            distributed.raise_together(bad)
            distributed.raise_together("features are so large that their distances overflow")
        largest = distributed.all_reduce(largest, "max")
        self.factor = 1.0 / float(largest) if largest > 0 else 1.0

    def _shift(self, features: Tensor, out: Tensor | None = None) -> Tensor:
        """Less the shift; in float64 where the features are, else in float32."""
        features = features.to(self._device)
        features = features if features.dtype == torch.float64 else features.float()
        return torch.sub(features, self._offset.to(features.dtype), out=out)

    def _norms(self, features: Tensor) -> Tensor:
        norms, whole = [], self.dim // NORM_TERMS * NORM_TERMS
        for part in features.split(self.chunk):
            shifted = self._shift(part)
            terms = shifted[:, :whole].unflatten(1, (whole // NORM_TERMS, NORM_TERMS)), shifted[:, None, whole:]
            norms.append(torch.cat([torch.linalg.vector_norm(few, dim=2) for few in terms], dim=1).double().norm(dim=1))
        return torch.cat(norms)

    def query_side(self, queries: Tensor, origin: Tensor, scale: Tensor, start: float) -> Tensor:
        """Left factor (Q, D + 2) of a product whose entries are `start` + `scale` (squared distance - `origin`).

        `origin` and `scale` (Q,) are float64, one for each of `queries` (int64 rows).
        """
        side = torch.empty((len(queries), self.dim + 2), dtype=torch.float32, device=self._device)
        features = self._shift(self._query.index_select(0, queries.to(self._query.device)))
        side[:, : self.dim] = features.mul_((-2 * self.factor * scale[:, None]).to(features.dtype))
        side[:, self.dim] = scale
        side[:, self.dim + 1] = scale * ((self._query_norms[queries] * self.factor).square() - origin) + start
        return side

    def multiply(self, query_side: Tensor, pictures: Tensor) -> Tensor:
        """The product (Q, n or a little more) with a chunk of the gallery: rows (n,) int64.

        Columns beyond n are infinite. The next product overwrites the result.
        """
        features = self._gallery.index_select(0, pictures.to(self._gallery.device))
        size = len(features)
        width = -(-size // ALIGNMENT) * ALIGNMENT
        side = self._side[:width]
        self._shift(features, out=side[:size, : self.dim]).mul_(self.factor)
        side[:size, self.dim] = (self._gallery_norms[pictures] * self.factor).square()
        side[:size, self.dim + 1] = 1.0
        product = self._product[: len(query_side) * width].view(len(query_side), width)
        # What is added to the dot products comes after them, so that its size is not in their many roundings.
        starts = [*range(0, self.dim, TERMS), self.dim]
        for start, stop in zip(starts, [*starts[1:], self.dim + 2], strict=True):
            # With beta 0 nothing is read of what lies in `product`.
            torch.addmm(product, query_side[:, start:stop], side[:, start:stop].T, beta=float(start > 0), out=product)
        product[:, size:] = torch.inf
        return product

    def error_bound(self, queries: Tensor) -> Tensor:
        """How far (Q,) a squared distance from a query can be off after the product, in these units; above zero.

        Always holds (Higham 2002, section 4.2): n terms summed in any order, then b such sums, are off by at most gamma
        |q| |g| with gamma = m u / (1 - m u), m = n + b; about so much where the features' entries are all nearly equal.
        """
        norms = self._query_norms[queries] * self.factor  # those of the gallery are at most 1
        num_roundings = min(self.dim, TERMS) + -(-self.dim // TERMS)
        gamma = 1.0 / (1.0 / (num_roundings * UNIT_ROUNDOFF) - 1.0)
        of_norms = (NORM_TERMS + 2) * UNIT_ROUNDOFF * (norms.square() + 1.0)
        return 2.0 * gamma * norms + of_norms + ROUNDINGS * UNIT_ROUNDOFF * (norms + 1.0).square()
