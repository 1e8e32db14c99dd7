"""What a memory step should cost: the model of docs/scaling.md.

Letters: N exemplars, D feature length, B global batch, k neighbours, W ranks.
"""

import itertools
from dataclasses import asdict, dataclass


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
