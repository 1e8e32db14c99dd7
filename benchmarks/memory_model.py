"""What a memory step should cost: the model of docs/scaling.md, and the rates that it needs.

Letters: N exemplars, D feature length, B global batch, k neighbours, W ranks.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks import harness
from ecn_dist import distributed


@dataclass(frozen=True)
class Rates:
    """What one rank has, all ranks at work at once."""

    matrix: float  # multiplications and additions a second in large products of the rows' type
    memory: float  # bytes a second to and from memory
    link: float  # bytes a second in and, at once, out
    latency: float  # seconds of a collective that moves next to nothing


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by what takes them, and bytes."""

    products: float
    rows: float  # reading the rows
    similarities: float  # moving the similarities of a chunk, where they leave the cache
    batch: float  # named rows, combination and update: what depends on B, not on N
    transfer: float
    latency: float
    bytes_received: float  # by one rank
    bytes_held: float  # rows of one rank

    def terms(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if not name.startswith("bytes")}

    @property
    def seconds(self) -> float:
        """The products hide the reading of the rows, or the reading hides the products; the rest is added."""
        return sum(self.terms().values()) - min(self.products, self.rows)


def predict(
    rates: Rates,
    *,
    exemplars: int,
    dim: int,
    batch: int,
    neighbors: int,
    world_size: int,
    row_bytes: int,
    feature_bytes: int = 4,
    reads: int = 1,
    similarity_bytes: int = 0,
) -> Cost:
    """The cost of loss, gradient and update on one rank of W. Collectives move (W - 1) / W of their global size.

    `reads` is how often a row comes from memory: once where a chunk stays in the cache between its two products.
    `similarity_bytes` is what goes to and from memory for each similarity: nothing where a chunk stays in the cache.
    """
    rows_here = -(-exemplars // world_size)
    share = (world_size - 1) / world_size
    gather = batch * (dim * feature_bytes + 8)
    combine = 8 * batch * ((3 + 2 * neighbors) + (1 + neighbors))
    scatter = 4 * batch * dim
    received = share * (gather + combine + scatter)
    # (B, D) arrays in float32, written or read: three for each of the k + 1 named rows, and about 20 for the rest.
    batch_bytes = 4 * batch * dim * (3 * (neighbors + 1) + 20)
    return Cost(
        products=4.0 * batch * rows_here * dim / rates.matrix,
        rows=reads * rows_here * dim * row_bytes / rates.memory,
        similarities=batch * rows_here * similarity_bytes / rates.memory,
        batch=batch_bytes / rates.memory,
        transfer=received / rates.link if world_size > 1 else 0.0,
        latency=6 * rates.latency if world_size > 1 else 0.0,
        bytes_received=received,
        bytes_held=rows_here * dim * row_bytes,
    )


# What goes to and from memory for a similarity on an accelerator, in bytes. PyTorch: written by the product, read for
# the group maxima and for the sum, read and written three times on the way to the exponential, read and written as
# half precision, read by the second product. Triton: a half-precision weight, written and read.
SIMILARITY_BYTES = {"torch": 4 + 4 + 4 + 3 * 8 + 6 + 2, "triton": 4}


def measure_rates(dtype: torch.dtype, device: torch.device, batch: int, dim: int) -> Rates:
    """Measure on all ranks at once; the slowest rank's figures, the same on every rank.

    The matrix rate is that of large square products on an accelerator, where it is the hardware's, and that of
    products of the batch's own shape on the CPU, where it depends much on the shape, and where rows in half precision
    are multiplied in single precision, a chunk at a time.
    """
    if device.type == "cpu":
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        left, right = torch.randn(batch, dim), torch.randn(2048, dim)
        left, right = left.to(dtype), right.to(dtype).t()
    else:
        left, right = torch.randn(2, 8192, 8192, device=device).to(dtype)
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=device)
    matrix_seconds = _fastest(lambda: torch.mm(left, right, out=out), device)
    operations = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]

    source = torch.ones(2**26 if device.type == "cpu" else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = _fastest(lambda: target.copy_(source), device)

    payload = torch.zeros(2**20 // distributed.world_size(), device=device)
    gather_seconds = _fastest(lambda: distributed.all_gather_rows(payload), device)
    nothing = torch.zeros(1, device=device)
    latency = _fastest(lambda: distributed.all_gather_rows(nothing), device)
    received = payload.nbytes * (distributed.world_size() - 1)
    slowest = torch.tensor([matrix_seconds, copy_seconds, gather_seconds, latency], dtype=torch.float64)
    matrix_seconds, copy_seconds, gather_seconds, latency = distributed.all_reduce(slowest, "max").tolist()
    alone = distributed.world_size() == 1
    return Rates(
        matrix=operations / matrix_seconds,
        memory=2 * source.nbytes / copy_seconds,
        link=float("inf") if alone else received / max(gather_seconds - latency, 1e-9),
        latency=0.0 if alone else latency,
    )


def _fastest(function: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median of some runs, begun together on all ranks."""
    function()
    seconds = []
    for _ in range(repeats):
        harness.synchronize(device)
        distributed.barrier()
        start = time.perf_counter()
        function()
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def h100(world_size: int) -> Rates:
    """Round figures to plan with, not measurements: H100 SXM GPUs, eight a node, 400 Gbit/s of network for each GPU.

    A collective's data enters a node once, through all of its eight network cards, and spreads inside over NVLink: so
    a GPU receives faster than its own card could bring.
    """
    return Rates(
        matrix=600e12, memory=2.8e12, link=300e9 if world_size <= 8 else 200e9, latency=20e-6 + 0.45e-6 * world_size
    )


def plan(*, dim: int = 2048, neighbors: int = 6, backend: str = "triton") -> list[dict[str, object]]:
    """The step from 1 to 100 million exemplars on 8 to 512 GPUs, bfloat16 rows; B = 1,024, or 16 images a GPU."""
    rows: list[dict[str, object]] = []
    for exemplars, world_size in itertools.product((10**6, 10**7, 10**8), (8, 64, 512)):
        for batch in sorted({1024, 16 * world_size}):
            cost = predict(
                h100(world_size),
                exemplars=exemplars,
                dim=dim,
                batch=batch,
                neighbors=neighbors,
                world_size=world_size,
                row_bytes=2,
                feature_bytes=2,
                reads=2,
                similarity_bytes=SIMILARITY_BYTES[backend],
            )
            terms = cost.terms()
            rows.append(
                {
                    "N": f"{exemplars // 10**6}M",
                    "GPUs": world_size,
                    "B": batch,
                    "GiB a GPU": f"{cost.bytes_held / 2**30:.3g}",
                    **{name: f"{1e3 * value:.2f}" for name, value in terms.items()},
                    "step ms": f"{1e3 * cost.seconds:.2f}",
                    "MB received": f"{cost.bytes_received / 1e6:.3g}",
                    "most": max(terms, key=lambda name: terms[name]),
                }
            )
    return rows
