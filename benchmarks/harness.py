"""What every benchmark shares: alternating timing, peak memory, the machine's description, tables, JSON results.

A timing on a busy machine means little alone, so sides are compared inside one run: each round times every side once,
in turn, and the report is the median over rounds and ratios of medians. Collectives: `alternate` calls a barrier and
one all-reduce a round and side, so that a step's time is that of its slowest rank; the rest is local.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ecn_dist import __version__, distributed
from ecn_dist.command import at_least

Row = Mapping[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator has done what it was given; nothing to do on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Time each side once a round, in turn, after `warmup` untimed rounds; seconds per call of the slowest rank.

    The order is reversed every other round, so that no side always runs after the same neighbour.
    """
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-warmup, rounds):
        order = list(sides) if round_number % 2 == 0 else list(sides)[::-1]
        for name in order:
            synchronize(device)
            distributed.barrier()
            start = time.perf_counter()
            sides[name]()
            synchronize(device)
            elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            slowest = distributed.all_reduce(elapsed, "max").item()
            if round_number >= 0:
                seconds[name].append(slowest)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of one side's time over the other's in the same round: steady where the machine is not."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_bytes(function: Callable[[], object], device: torch.device | None = None) -> int | None:
    """By how much memory in use rises above its level at the start while `function` runs, on this rank.

    On an accelerator the allocator's own figure. On the CPU the growth of the resident set, by Linux's resettable
    high-water mark; None where the system does not offer it. Run `function` once before, so that libraries' own
    lasting buffers are not counted.
    """
    device = device or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        function()
        return torch.accelerator.max_memory_allocated(device) - before
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident size
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def peak_tensor_bytes(function: Callable[[], object], device: torch.device | None = None) -> int:
    """By how much the memory of tensors rises above its level at the start while `function` runs, on this rank.

    To the byte and the same every time, as the allocator counts it; what libraries take beside tensors is not in it.
    """
    device = device or torch.device("cpu")
    if device.type != "cpu":
        return peak_bytes(function, device) or 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write of its starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((change["args"]["Bytes"] for change in changes), initial=0))


def _return_free_memory() -> None:
    """What the C library keeps of freed memory would be used again, unseen by a high-water mark."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def process_peak_bytes() -> int:
    """The highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What a reader needs to place a figure: processor, cores, threads, memory, accelerator, versions."""
    device = device or torch.device("cpu")
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ecn_dist": __version__,
        "accelerator": None,
    }
    if device.type == "cuda":
        described["accelerator"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        described["accelerator"] = device.type
    return described


def _processor() -> str:
    """The processor's name with its family and model, since virtual machines often hide the rest of the name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def machine_name(described: Row) -> str:
    """A short file-name form of `machine()`, such as `amd-epyc-2-cores` or `nvidia-h100-80gb-hbm3`."""
    name = described["accelerator"] or f"{described['processor'].split(' (family')[0]} {described['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def markdown_table(rows: Iterable[Row], columns: Mapping[str, str | Callable[[Row], str]] | None = None) -> str:
    """A Markdown table of `rows`; `columns` maps each heading to a key of the rows, or to a function of a row."""
    rows = list(rows)
    if columns is None:
        columns = {key: key for row in rows for key in row}
    body = [[_cell(row, source) for source in columns.values()] for row in rows]
    widths = [max([len(heading), *(len(line[at]) for line in body)]) for at, heading in enumerate(columns)]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join(
        [line(columns), "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *map(line, body)]
    )


def _cell(row: Row, source: str | Callable[[Row], str]) -> str:
    value = source(row) if callable(source) else row.get(source)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def add_options(parser: argparse.ArgumentParser, *, rounds: int = 5) -> None:
    """The options that every benchmark has."""
    parser.add_argument(
        "--rounds", type=at_least(1), default=rounds, help="timed rounds; the report is their median (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (%(default)s)")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON results, table and figures (default: print only)"
    )
    parser.add_argument("--machine", help="the machine's name in the results' file names (default: from its hardware)")


def with_earlier(
    folder: Path | None,
    benchmark: str,
    described: Row,
    results: list[dict[str, Any]],
    *,
    name: str | None = None,
    case: Callable[[Row], Any],
) -> list[dict[str, Any]]:
    """`results`, and the rows of other cases that `write_results` left in `folder`; in the order of `case`."""
    path = results_path(folder, benchmark, described, name) if folder else None
    earlier = json.loads(path.read_text())["results"] if path and path.exists() else []
    rows = {case(row): row for row in [*earlier, *results]}
    return [rows[key] for key in sorted(rows)]


def results_path(folder: Path, benchmark: str, described: Row, name: str | None) -> Path:
    return folder / f"{benchmark}-{name or machine_name(described)}.json"


def write_results(
    folder: Path,
    benchmark: str,
    described: Row,
    results: list[dict[str, Any]],
    *,
    name: str | None = None,
    title: str,
    tables: str,
) -> Path:
    """Write `BENCHMARK-MACHINE.json` and `.md` into `folder`; returns the former's path.

    The one has the machine, the date and the rows, for programs; the other `title`, the machine and `tables`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = results_path(folder, benchmark, described, name)
    document = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": dict(described),
        "results": results,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in described.items() if value is not None)
    path.with_suffix(".md").write_text(f"# {title}\n\n{about}.\n\n{tables.strip()}\n")
    return path
