"""What every benchmark shares: alternating timing, peak memory, the machine's description, tables, results.

A timing on a busy machine means little alone, so sides are compared inside one run: each round times every side once,
in turn, and the report is the median over rounds and ratios of medians. Collectives: `alternate` calls a barrier and
one all-reduce a round and side, so that a step's time is that of its slowest rank; the rest is local.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ecn_dist import __version__, distributed
from ecn_dist.errors import UserError

Row = Mapping[str, Any]
CPU = torch.device("cpu")


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device = CPU,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each side once a round, in turn, after `warmup` untimed rounds; seconds per call of the slowest rank.

    The order is reversed every other round, so that no side always runs after the same neighbour. `clock` may be
    `time.process_time`: this process's processor time, which others on the machine disturb little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-warmup, rounds):
        for name in list(sides)[:: 1 if round_number % 2 == 0 else -1]:
            synchronize(device)
            distributed.barrier()
            start = clock()
            sides[name]()
            synchronize(device)
            elapsed = torch.tensor(clock() - start, dtype=torch.float64)
            slowest = distributed.all_reduce(elapsed, "max").item()
            if round_number >= 0:
                seconds[name].append(slowest)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def start_ranks(benchmark: str, world_size: int, arguments: list[str], threads: int) -> None:
    """Run `benchmarks BENCHMARK` on so many ranks of this machine, with `threads` each. `UserError` where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command += ["-m", "benchmarks", benchmark, *arguments]
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False).returncode
    if status:
        raise UserError(f"the benchmark on {world_size} ranks ended with status {status}; see above")


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of one side's time over the other's in the same round: steady where the machine is not."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_tensor_bytes(function: Callable[[], object], device: torch.device = CPU) -> int:
    """By how much the memory of tensors rises above its level at the start while `function` runs, on this rank.

    To the byte and the same every time, as the allocator counts it; what libraries take beside tensors is not in it.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        function()
        return torch.accelerator.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write of its starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((change["args"]["Bytes"] for change in changes), initial=0))


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What a reader needs to place a figure: processor, cores, threads, accelerator, versions."""
    processor = platform.processor() or platform.machine()
    if found := re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE):
        processor = found[1]
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ecn_dist": __version__,
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def markdown_table(rows: Iterable[Row]) -> str:
    """A Markdown table of `rows`, with a column for each key of any row."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = [f"| {' | '.join(c.rjust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
    return "\n".join([head, f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|", *body])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def add_options(parser: argparse.ArgumentParser, *, rounds: int = 5) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds; their median counts (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the table and the results (default: print only)")
    parser.add_argument("--machine", help="the machine's name in the results' file names (default: from its hardware)")


def report(options: argparse.Namespace, benchmark: str, described: Row, rows: list[dict[str, Any]], text: str) -> None:
    """Print `text`, the tables; with --output write `BENCHMARK-MACHINE.json` (machine, date, rows) and `.md` too."""
    print(text)
    if not options.output:
        return
    hardware = described["accelerator"] or f"{described['processor']} {described['cores']} cores"
    name = options.machine or re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    path = options.output / f"{benchmark}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "machine": dict(described), "results": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in described.items() if value is not None)
    path.with_suffix(".md").write_text(f"# Benchmark: {benchmark}\n\n{about}.\n\n{text.strip()}\n")
    print(f"written: {path} and beside it .md")
