"""`python -m benchmarks memory`: time, memory and traffic of a memory step against N, D, B, k, row type and ranks.

Every case times, in turn within one run: the sharded memory's loss + backward + update; the two bare matrix products
that it cannot avoid; and the published formulation (full matrix, full sort, row-by-row update). First it checks that
both memories give the same loss, gradient and rows. The figures of the slowest rank are reported. Under torchrun it
measures on those ranks.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, memory_model, memory_sides
from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exemplars", type=int, nargs="+", default=[32_621], metavar="N", help="(%(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", default=[2048], metavar="D", help="(%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128], metavar="B", help="global (%(default)s)")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[6], metavar="k", help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES, help="of the rows (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="W", help="start so many ranks here, one count a time")
    parser.add_argument("--threads", type=int, default=1, help="a rank, on the CPU (%(default)s)")
    parser.add_argument(
        "--backend", default="torch", choices=["torch", "triton"], help="of the memory, and in the plan (%(default)s)"
    )
    parser.add_argument("--plan", action="store_true", help="print the cost model's plan for many GPUs, and end")
    harness.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every combination of the lists given; print the table and, with --output, write it."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.plan:
        print(harness.markdown_table(memory_model.plan(backend=options.backend)))
        return 0
    if options.ranks and "RANK" not in os.environ:  # ranks that torchrun started get the option too
        for world_size in options.ranks:
            harness.start_ranks("memory", world_size, arguments, options.threads)
        return 0
    torch.set_num_threads(options.threads)
    rows = measure(options)
    if distributed.is_main():
        described = harness.machine(distributed.resolve_device(options.device))
        world_size = distributed.world_size()
        name = "memory" if world_size == 1 else f"memory-{world_size}-ranks"
        harness.report(options, name, described, rows, harness.markdown_table(rows))
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for every case, on all ranks; the same rows on every rank."""
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    lists = (options.dtypes, options.dims, options.batches, options.neighbors, options.exemplars)
    rows = []
    for dtype, dim, batch, neighbors, exemplars in itertools.product(*lists):
        if batch % distributed.world_size() or batch > exemplars:
            raise UserError(f"batch {batch} must divide by the ranks and be at most N = {exemplars}")
        case = memory_sides.Case(exemplars, dim, batch, neighbors, DTYPES[dtype], device)
        rows.append(measure_case(case, options.backend, options.rounds))
    return rows


def measure_case(case: memory_sides.Case, backend: str, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    step, memory = memory_sides.sharded(case, backend)
    published, rows_ND = memory_sides.published(case)
    check_agreement(published(), rows_ND, step(), memory)
    products = memory_sides.bare_products(case, memory.rows)
    peaks = [_largest(harness.peak_tensor_bytes(side, case.device)) for side in (step, published)]
    with distributed.count_traffic() as traffic:
        step()
    sides: dict[str, Callable[[], object]] = {"step": step, "published": published, "products": products}
    seconds = harness.alternate(sides, rounds, device=case.device)
    return {
        "N": case.exemplars,
        "D": case.dim,
        "B": case.batch,
        "k": case.neighbors,
        "rows": str(case.dtype).removeprefix("torch."),
        "ranks": distributed.world_size(),
        "step s": harness.medians(seconds)["step"],
        "/ products": harness.median_ratio(seconds["step"], seconds["products"]),
        "published / step": harness.median_ratio(seconds["published"], seconds["step"]),
        "peak MB": peaks[0] / 1e6,
        "published peak MB": peaks[1] / 1e6,
        "rows MB a rank": memory.partition.rows_per_rank * case.dim * case.dtype.itemsize / 1e6,
        "sent MB": sum(traffic.values()) / 1e6,
    }


def check_agreement(
    published: tuple[torch.Tensor, torch.Tensor],
    rows_ND: torch.Tensor,
    sharded: tuple[torch.Tensor, torch.Tensor],
    memory: ExemplarMemory,
) -> None:
    """A comparison of speed is worth nothing where the results differ."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(memory.rows.dtype, 0.05)
    rows_MD = rows_ND[memory.first_row : memory.first_row + len(memory.rows)]
    pairs = {"loss": (published[0], sharded[0]), "rows": (rows_MD, memory.rows)}
    if tolerance < 0.05:  # rounded similarities choose other neighbours among nearly equal ones
        pairs["gradient"] = (published[1], sharded[1])
    for what, (found, wanted) in pairs.items():
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        difference = float((found - wanted).abs().max()) if wanted.numel() else 0.0
        if not difference <= tolerance * max(scale, 1e-30):
            raise RuntimeError(f"the published {what} differs by {difference:g} of {scale:g}")


def _largest(value: float) -> float:
    return distributed.all_reduce(torch.tensor(value, dtype=torch.float64), "max").item()
