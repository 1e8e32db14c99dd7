"""CMC, precision-recall and training curves."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from ecn_dist.reporting.pictures.canvas import FAINT_INK, PAPER, TITLE, new_axes, new_figure, series_style

CLEAR = {"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 1.0}  # behind words that a curve may cross
MAX_POINTS = 200  # of a drawn training curve; longer ones are shown as the mean and range of equal parts


def draw_cmc(curves: Mapping[str, np.ndarray], *, ranks: int = 20) -> Figure:
    """CMC curves by label (rank-1 first, fractions), up to `ranks`; rank-1, -5 and -10 of a lone curve are written."""
    figure = new_figure(5.2, 3.6)
    axes = new_axes(figure, 111, "Cumulative matching (CMC)", "rank", "queries matched within rank, percent")
    for position, (label, cmc) in enumerate(curves.items()):
        percent = 100 * np.asarray(cmc, dtype=np.float64)[:ranks]
        at = np.arange(1, len(percent) + 1)
        axes.plot(at, percent, marker="o", markersize=3, label=label, **series_style(position))
        if len(curves) == 1:
            for rank in (1, 5, 10):
                if rank <= len(percent):
                    axes.annotate(
                        f"rank-{rank}: {percent[rank - 1]:.1f}",
                        (rank, percent[rank - 1]),
                        xytext=(4, -14) if percent[rank - 1] > 50 else (0, 8),
                        textcoords="offset points",
                        fontsize=8,
                    )
    axes.set_ylim(0, 103)
    axes.set_xlim(0.5, max((min(ranks, len(cmc)) for cmc in curves.values()), default=ranks) + 0.5)
    axes.xaxis.set_major_locator(FixedLocator([1, *range(5, ranks + 1, 5)]))
    if len(curves) > 1:
        _legend(axes, "lower right")
    return figure


def draw_precision_recall(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "Precision and recall"
) -> Figure:
    """Mean precision over recall by label: (recall levels, precision), fractions."""
    figure = new_figure(5.2, 3.6)
    axes = new_axes(figure, 111, title, "recall, percent", "precision, percent")
    for position, (label, (recall, precision)) in enumerate(curves.items()):
        axes.plot(100 * np.asarray(recall), 100 * np.asarray(precision), label=label, **series_style(position))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 103)
    if len(curves) > 1:
        _legend(axes, "upper right")
    return figure


def draw_training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses, learning rates and speed over the steps, from the objects of a run's metrics.jsonl.

    Also the evaluations made during training, where there are any. A key that a row lacks (or has as null) leaves a
    gap; keys that no row has leave their panel out.
    """
    panels = [panel for panel in _PANELS if any(_series(rows, key)[0].size for key in panel.keys)]
    columns = 2 if len(panels) > 1 else 1
    lines = max(-(-len(panels) // columns), 1)
    figure = new_figure(5.2 * columns, 2.9 * lines)
    if not panels:
        axes = new_axes(figure, 111, "Training")
        axes.text(0.5, 0.5, "No step was logged.", transform=axes.transAxes, ha="center", fontsize=9, color=FAINT_INK)
        return figure
    for position, panel in enumerate(panels):
        axes = new_axes(figure, (lines, columns, position + 1), "", "step", panel.unit)
        axes.set_title(panel.title, **TITLE, pad=17)  # above the epochs' numbers
        axes.grid(visible=False, axis="x")
        for line, (key, label) in enumerate(panel.keys.items()):
            steps, values = _series(rows, key)
            if steps.size:
                _line(axes, steps, panel.scale * values, label, line, marked=panel.marked)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _epochs(axes, rows)
        if len(panel.keys) > 1 and len(axes.get_legend_handles_labels()[1]) > 1:
            _legend(axes, "best")
    return figure


class _Panel:
    def __init__(
        self,
        title: str,
        unit: str,
        keys: dict[str, str],
        *,
        scale: float = 1.0,
        from_zero: bool = True,
        marked: bool = False,
    ) -> None:
        self.title, self.unit, self.keys, self.scale = title, unit, keys, scale
        self.from_zero, self.marked = from_zero, marked


_PANELS = (
    _Panel("Loss", "", {"loss": "total", "loss_source": "source", "loss_target": "target"}),
    _Panel(
        "Result on the target while training",
        "percent",
        {"evaluation.mAP": "mAP (trapezoid)", "evaluation.rank1": "rank-1"},
        scale=100.0,
        marked=True,
    ),
    _Panel("Learning rate", "", {"lr": "new layers", "lr_backbone": "backbone"}),
    _Panel("Speed", "images per second", {"images_per_second": "all ranks together"}),
    _Panel("Waiting for data", "seconds a step", {"data_wait": "data wait"}),
)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key` (a dot goes into a nested object, where there is one), where they are numbers."""
    points = []
    for row in rows:
        value: Any = row
        *outer, name = key.split(".")
        for part in outer:
            value = value.get(part, value)
        value = value.get(name)
        if isinstance(value, int | float) and _is_number(row, "step"):
            points.append((float(row["step"]), float(value)))
    if not points:
        return np.empty(0), np.empty(0)
    steps, values = np.array(points).T
    return steps, values


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, position: int, *, marked: bool) -> None:
    """The curve; where it has more points than can be seen, the mean of equal parts in a band of their range."""
    style = series_style(position)
    if len(steps) > MAX_POINTS:
        parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
        low = np.array([np.min(values[part]) for part in parts])
        high = np.array([np.max(values[part]) for part in parts])
        steps = np.array([steps[part].mean() for part in parts])
        values = np.array([values[part].mean() for part in parts])
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    lone = len(steps) == 1 or marked
    axes.plot(steps, values, label=label, marker="o" if lone else None, markersize=3.5, **style)


def _epochs(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """One span of steps for all panels; small marks where epochs begin, as many as stay readable, and a shade over the
    source-only epochs (those below 0)."""
    at = [
        (float(row["step"]), float(row["epoch"]))
        for row in rows
        if _is_number(row, "step") and _is_number(row, "epoch")
    ]
    if not at:
        return
    first, last = min(step for step, _ in at), max(step for step, _ in at)
    margin = 0.02 * max(last - first, 1.0)
    axes.set_xlim(first - margin, last + margin)
    starts: dict[float, float] = {}
    for step, epoch in sorted(at):
        starts.setdefault(epoch, step)
    above = axes.get_xaxis_transform()
    every = max(-(-len(starts) // 10), 1)
    for epoch, step in starts.items():
        if epoch % every == 0:
            axes.plot((step, step), (1.0, 1.02), transform=above, color=FAINT_INK, linewidth=0.8, clip_on=False)
            axes.text(step, 1.03, f"{epoch:g}", transform=above, fontsize=6.5, color=FAINT_INK, ha="center")
    axes.text(1.0, 1.09, "epoch", transform=axes.transAxes, fontsize=6.5, color=FAINT_INK, ha="right")
    source_only = [epoch for epoch in starts if epoch < 0]
    if source_only:
        end = min((step for epoch, step in starts.items() if epoch >= 0), default=last)
        axes.axvspan(first, end, color=FAINT_INK, alpha=0.08, linewidth=0, zorder=0)
        axes.text(
            (first + end) / 2,
            0.02,
            "source only",
            transform=above,
            fontsize=7,
            color=FAINT_INK,
            ha="center",
            bbox=CLEAR,
        )


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float)


def _legend(axes: Axes, where: Literal["best", "upper right", "lower right"]) -> None:
    axes.legend(loc=where, fontsize=8, frameon=True, facecolor=PAPER, edgecolor="none", framealpha=0.85)
