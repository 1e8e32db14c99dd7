"""`python -m benchmarks memory`: time, memory and traffic of a memory step against N, D, B, k, row type and ranks.

Every case times, in turn within one run: the sharded memory's loss + backward + update; the two bare matrix products
that it cannot avoid; and the published formulation (full matrix, full sort, row-by-row update). First it checks that
both memories give the same loss, gradient and rows. The figures of the slowest rank are reported, beside what the cost
model of docs/scaling.md expects from rates measured in the same run.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, memory_drift, memory_model, memory_sides
from benchmarks.memory_figure import draw
from ecn_dist import distributed
from ecn_dist.errors import UserError

SIDES = ("products", "published")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

COLUMNS: dict[str, str | Callable[[harness.Row], str]] = {
    "N": "exemplars",
    "D": "dim",
    "B": "batch",
    "k": "neighbors",
    "rows": "dtype",
    "ranks": "ranks",
    "step s": "seconds",
    "/ products": "over_products",
    "/ floor": "over_floor",
    "published / step": "published_over_step",
    "model s": "predicted_seconds",
    "peak MB": lambda row: _megabytes(row["peak_bytes"]),
    "resident peak MB": lambda row: _megabytes(row["resident_peak_bytes"]),
    "published peak MB": lambda row: _megabytes(row["published_peak_bytes"]),
    "rows MB a rank": lambda row: _megabytes(row["rows_bytes"]),
    "sent MB": lambda row: _megabytes(row["sent_bytes"]),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exemplars", type=int, nargs="+", default=[32_621], metavar="N", help="(%(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", default=[2048], metavar="D", help="(%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128], metavar="B", help="global (%(default)s)")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[6], metavar="k", help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES, help="of the rows (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="W", help="start so many ranks here, one count a time")
    parser.add_argument("--threads", type=int, default=1, help="a rank, on the CPU (%(default)s)")
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES, help="what to compare with (all)")
    parser.add_argument(
        "--backend", default="torch", choices=["torch", "triton"], help="of the memory, and in the plan (%(default)s)"
    )
    parser.add_argument("--plan", action="store_true", help="print the cost model's plan for many GPUs, and end")
    parser.add_argument("--drift", action="store_true", help="compare half-precision rows with float32 ones, and end")
    harness.add_options(parser)
    parser.add_argument("--add", action="store_true", help="keep the other cases of results already in --output")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # how ranks started here hand back their rows
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every combination of the lists given; print the table and, with --output, write it."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.plan:
        print(harness.markdown_table(memory_model.plan(backend=options.backend)))
        return 0
    if options.drift:
        torch.set_num_threads(options.threads)
        table = harness.markdown_table(memory_drift.measure())
        print(table)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "memory-drift.md").write_text(f"# Rounding of memory rows\n\n{table}\n")
        return 0
    started_here = options.json is not None  # then --ranks was the starter's
    if options.ranks and "RANK" in os.environ and not started_here:
        raise UserError("bench memory: --ranks starts ranks itself; leave it out under torchrun")
    torch.set_num_threads(options.threads)
    if options.ranks and not started_here:
        results = [row for world_size in options.ranks for row in _run_ranks(world_size, arguments, options)]
    else:
        results = measure(options)
    if not distributed.is_main():
        return 0
    if options.json:
        options.json.write_text(json.dumps(results))
        return 0
    described = harness.machine(distributed.resolve_device(options.device))
    if options.add:
        results = harness.with_earlier(options.output, "memory", described, results, name=options.machine, case=_case)
    table = harness.markdown_table(results, COLUMNS)
    print(table)
    if options.output:
        path = harness.write_results(
            options.output, "memory", described, results, name=options.machine, title="The memory step", tables=table
        )
        draw(results, path.with_suffix(".png"))
        print(f"written: {path} and beside it .md and .png")
    return 0


def _run_ranks(world_size: int, arguments: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same benchmark on `world_size` ranks of this machine, started by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command += ["-m", "benchmarks", "memory", *arguments, "--json", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        print(f"{world_size} ranks ...", file=sys.stderr, flush=True)
        status = subprocess.run(command, env=environment, check=False).returncode
        if status or not path.exists():
            raise UserError(f"bench memory: the run on {world_size} ranks ended with status {status}; see above")
        return json.loads(path.read_text())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, on all ranks; the same rows on every rank."""
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    lists = (options.dtypes, options.dims, options.batches, options.neighbors, options.exemplars)
    results = []
    for dtype, dim, batch, neighbors, exemplars in itertools.product(*lists):
        if batch % distributed.world_size() or batch > exemplars:
            raise UserError(f"bench memory: batch {batch} must divide by the ranks and be at most N = {exemplars}")
        case = memory_sides.Case(exemplars, dim, batch, neighbors, DTYPES[dtype], device)
        rates = memory_model.measure_rates(case.dtype, device, batch, dim)
        result = measure_case(case, rates, options)
        results.append({"dtype": dtype, "backend": options.backend} | result)
        if distributed.is_main():
            print(f"N = {exemplars}: {result['seconds']:.4g} s a step", file=sys.stderr, flush=True)
    return results


def measure_case(case: memory_sides.Case, rates: memory_model.Rates, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    device, world_size = case.device, distributed.world_size()
    step, memory = memory_sides.sharded(case, options.backend)
    loss, gradient_bD = step()
    sides: dict[str, Callable[[], object]] = {"step": step}
    if "published" in options.sides:
        sides["published"], rows_ND = memory_sides.published(case)
        _check_agreement("published", sides["published"](), rows_ND, (loss, gradient_bD), memory)
    if "products" in options.sides:
        sides["products"] = memory_sides.bare_products(case, memory.rows)

    formulations = {name: side for name, side in sides.items() if name != "products"}
    peaks = {name: _largest(harness.peak_tensor_bytes(side, device)) for name, side in formulations.items()}
    resident = _largest(harness.peak_bytes(step, device))
    with distributed.count_traffic() as traffic:
        step()
    seconds = harness.alternate(sides, options.rounds, device=device)
    median = harness.medians(seconds)
    cost = memory_model.predict(
        rates,
        exemplars=case.exemplars,
        dim=case.dim,
        batch=case.batch,
        neighbors=case.neighbors,
        world_size=world_size,
        row_bytes=case.dtype.itemsize,
        reads=1 if device.type == "cpu" else 2,
        similarity_bytes=0 if device.type == "cpu" else memory_model.SIMILARITY_BYTES[options.backend],
    )
    rows_bytes = memory.partition.rows_per_rank * case.dim * case.dtype.itemsize
    operations = 4.0 * case.batch * memory.partition.rows_per_rank * case.dim
    floor = max(operations / rates.matrix, rows_bytes / rates.memory)

    def over(numerator: str, denominator: str) -> float | None:
        if {numerator, denominator} <= set(sides):
            return harness.median_ratio(seconds[numerator], seconds[denominator])
        return None

    return {
        "exemplars": case.exemplars,
        "dim": case.dim,
        "batch": case.batch,
        "neighbors": case.neighbors,
        "ranks": world_size,
        "threads": torch.get_num_threads(),
        "seconds": median["step"],
        "seconds_by_side": median,
        "over_products": over("step", "products"),
        "over_floor": median["step"] / floor,
        "published_over_step": over("published", "step"),
        "predicted_seconds": cost.seconds,
        "predicted": asdict(cost),
        "rates": asdict(rates),
        "peak_bytes": peaks["step"],
        "resident_peak_bytes": resident,
        "published_peak_bytes": peaks.get("published"),
        "rows_bytes": rows_bytes,
        "sent_bytes": sum(traffic.values()),
        "sent_by_collective": dict(traffic),
        "rounds": options.rounds,
    }


def _case(row: harness.Row) -> tuple[Any, ...]:
    """What tells one line of the table from another, in the table's order."""
    return tuple(row[key] for key in ("backend", "dtype", "dim", "batch", "neighbors", "ranks", "exemplars"))


def _check_agreement(
    name: str, found: Any, rows_ND: torch.Tensor, wanted: tuple[torch.Tensor, torch.Tensor], memory: Any
) -> None:
    """A comparison of speed is worth nothing where the results differ."""
    exact = memory.rows.dtype in (torch.float64, torch.float32)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(memory.rows.dtype, 0.05)
    rows_MD = rows_ND[memory.first_row : memory.first_row + len(memory.rows)]
    pairs = {
        "loss": (found[0], wanted[0]),
        "rows": (rows_MD[:: max(1, len(rows_MD) // 4096)], memory.rows[:: max(1, len(rows_MD) // 4096)]),
    }
    if exact:  # rounded similarities choose other neighbours among nearly equal ones
        pairs["gradient"] = (found[1], wanted[1])
    for what, (one, other) in pairs.items():
        scale = float(other.abs().max()) if other.numel() else 0.0
        difference = float((one - other).abs().max()) if other.numel() else 0.0
        if not difference <= tolerance * max(scale, 1e-30):
            raise RuntimeError(
                f"{name}: its {what} differs by {difference:g} of {scale:g} on rank {distributed.rank()}"
            )


def _largest(peak: int | None) -> int | None:
    """Over ranks; None where any rank has no figure."""
    peaks = distributed.gather_objects(peak)
    return None if None in peaks else max(value for value in peaks if value is not None)


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.4g}"


if __name__ == "__main__":
    sys.exit(main())
