"""The figure of the memory benchmark: time and working memory against N, time against ranks."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import Row

NAMES = {
    "step": "sharded memory",
    "products": "two bare products",
    "published": "published formulation",
    "replicated": "replicated memory",
}
COLORS = {"step": "#1b6ca8", "products": "#8a8a8a", "published": "#c8553d", "replicated": "#588157", "model": "#1b6ca8"}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the most `results` that share D, B, k and row type; panels without two points stay away."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared = ("dim", "batch", "neighbors", "dtype")
    (chosen, _), *_ = Counter(tuple(row[key] for key in shared) for row in results).most_common(1)
    rows = [row for row in results if tuple(row[key] for key in shared) == chosen]
    fewest = min(row["ranks"] for row in rows)
    largest = max(row["exemplars"] for row in rows)
    by_exemplars = sorted((row for row in rows if row["ranks"] == fewest), key=lambda row: row["exemplars"])
    by_ranks = sorted((row for row in rows if row["exemplars"] == largest), key=lambda row: row["ranks"])
    panels: list[Callable[[Any], None]] = []
    if len(by_exemplars) > 1:
        panels.append(lambda axes: _time_panel(axes, by_exemplars, "exemplars", f"exemplars N ({_ranks(fewest)})"))
        panels.append(lambda axes: _memory_panel(axes, by_exemplars))
    if len(by_ranks) > 1:
        panels.append(lambda axes: _time_panel(axes, by_ranks, "ranks", f"ranks (N = {largest:,})"))
    if not panels:
        return
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(all_axes[0], panels, strict=True):
        panel(axes)
        axes.grid(True, which="both", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Memory step: loss + backward + update, D = {dim}, B = {batch}, k = {neighbors}, {dtype} rows"
    named = {label: line for axes in all_axes[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False, fontsize=8)
    figure.suptitle(title.format_map(rows[0]), fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _time_panel(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    for side, name in NAMES.items():
        points = [(row[key], row["seconds_by_side"][side]) for row in rows if side in row["seconds_by_side"]]
        _line(axes, points, side, name)
    _line(axes, [(row[key], row["predicted_seconds"]) for row in rows], "model", "cost model", linestyle=":")
    axes.set(xlabel=label, ylabel="seconds a step", xscale="log", yscale="log")
    _name_ticks(axes, rows, key)


def _memory_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    for side, key in (("step", "peak_bytes"), ("published", "published_peak_bytes")):
        _line(axes, [(row["exemplars"], row[key] / 1e6) for row in rows if row[key]], side, NAMES[side])
    axes.set(xlabel="exemplars N", ylabel="peak memory above the rows, MB", xscale="log", yscale="log")
    _name_ticks(axes, rows, "exemplars")


def _line(axes: Any, points: Iterable[tuple[float, float]], side: str, name: str, linestyle: str = "-") -> None:
    points = list(points)
    if points:
        marker = "o" if linestyle == "-" else ""
        axes.plot(*zip(*points, strict=True), linestyle, marker=marker, markersize=4, color=COLORS[side], label=name)


def _name_ticks(axes: Any, rows: Iterable[Row], key: str) -> None:
    from matplotlib.ticker import LogLocator

    values = sorted({row[key] for row in rows})
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
    axes.minorticks_off()


def _ranks(count: int) -> str:
    return "one rank" if count == 1 else f"{count} ranks"
