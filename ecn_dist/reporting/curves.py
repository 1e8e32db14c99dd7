"""CMC and precision-recall, the result by camera pair, and training curves.

Shape letters: C cameras; the first C of a table is the query's camera, the second the gallery's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ecn_dist.ranking.ranking import CameraPairs, RankingResult
from ecn_dist.reporting.montage import DPI, FAINT_INK, INK, PAPER
from ecn_dist.reporting.run_reader import numbers

# Lines are told apart by dash as well as by colour.
STYLE: Any = {
    "figure.facecolor": PAPER,
    "figure.dpi": DPI,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT_INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=["#0b6fa8", "#d1670a", "#00845f", "#8a4f9e", "#b3243b", "#5f6b73"])
    + cycler(linestyle=["-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)), (0, (3, 3))]),
    "grid.color": "#e3e4e0",
    "legend.edgecolor": "none",
    "legend.facecolor": PAPER,
    "lines.markersize": 3,
    "text.color": INK,
    "text.parse_math": False,
}
MAX_POINTS = 200  # of a drawn training curve; longer ones are shown as means of equal parts
MAX_PANELS = 12
# The panels that come first, with the keys that stand in them; any other key has a panel of its own.
_PANELS = {
    "loss": r"loss(_.*)?",
    "evaluation, fraction": r"evaluation .*",
    "validation, fraction": r"validation_.*",
    "learning rate": r"lr(_.*)?",
    "clusters, outliers": r"clusters|outliers",
    "cluster size, pictures": r"cluster_size_.*",
    "pairs by two cameras, fraction": r"cluster_cross_camera",
    "AMI of clusters and people": r"cluster_ami",
    "data wait, seconds": r"data_wait",
}


@matplotlib.rc_context(STYLE)
def draw_result(result: RankingResult, *, ranks: int = 20) -> Figure:
    """The CMC up to `ranks`, with rank-1, -5 and -10 written at it, and the mean precision over recall."""
    figure = Figure(figsize=(9.6, 3.6))
    left, right = figure.subplots(1, 2)
    left.set(title="Cumulative matching (CMC)", xlabel="rank", ylabel="queries matched within rank, percent")
    percent = 100 * np.asarray(result.cmc)[:ranks]
    left.plot(np.arange(1, len(percent) + 1), percent, marker="o")
    for rank in (1, 5, 10):
        at = (rank, percent[rank - 1])
        left.annotate(f"rank-{rank}: {at[1]:.1f}", at, (5, -12), textcoords="offset points")
    left.set(xlim=(0.5, ranks + 0.5), xticks=[1, *range(5, ranks + 1, 5)], ylim=(0, 103))
    right.set(title="Precision and recall", xlabel="recall, percent", ylabel="precision, percent")
    right.set(xlim=(0, 100), ylim=(0, 103))
    right.plot(100 * result.recall_levels, 100 * result.precision_at_recall)
    return figure


@matplotlib.rc_context(STYLE)
def draw_camera_pairs(pairs: CameraPairs) -> Figure:
    """mAP as percentages on colour; below it, for up to 8 cameras, how many queries it stands on."""
    camids, few = pairs.camids.tolist(), len(pairs.camids) <= 8
    side = max(len(camids) * (0.62 if few else 0.46), 2.2)
    figure = Figure(figsize=(side + 1.9, side + 1.15))
    axes = figure.subplots()
    axes.set(title="mAP by camera pair, percent", xlabel="camera of the gallery", ylabel="camera of the query")
    axes.grid(False)
    colors = matplotlib.colormaps["cividis"].with_extremes(bad=PAPER)  # the same to colour-blind readers
    image = axes.imshow(np.ma.masked_invalid(100 * pairs.mAP), vmin=0.0, vmax=100.0, cmap=colors)
    axes.set_xticks(range(len(camids)), camids)
    axes.set_yticks(range(len(camids)), camids)
    for (query, gallery), value in np.ndenumerate(pairs.mAP):
        words, ink = "-", FAINT_INK
        if not np.isnan(value):
            words, ink = f"{100 * value:.0f}", "white" if value < 0.5 else INK
            words += f"\nn {pairs.num_valid_queries[query, gallery]:,}" if few else ""
        axes.text(gallery, query, words, ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=22, pad=0.03).outline.set_visible(False)
    return figure


def weakest_camera_pairs(pairs: CameraPairs, count: int = 3) -> list[dict[str, Any]]:
    """The `count` lowest mAPs that are not NaN, lowest first."""
    names = pairs.camids.tolist()
    known = [(at, float(value)) for at, value in np.ndenumerate(pairs.mAP) if not np.isnan(value)]
    return [
        {"query_camera": names[query], "gallery_camera": names[gallery], "value": value}
        for (query, gallery), value in sorted(known, key=lambda pair: pair[1])[:count]
    ]


@matplotlib.rc_context(STYLE)
def draw_training_curves(rows: Sequence[Mapping[str, Any]], keys: str = ".*") -> Figure | None:
    """The numbers of a run's metrics.jsonl over the steps, in small panels; None where there is none.

    Drawn are the keys that match the regular expression `keys`. Some stand together (`_PANELS`); any other has a panel
    of its own, which is left out where all is zero. Where a row lacks a key, or has no number there, the curve has no
    point. Shaded: the epochs on the source alone, which are those below 0.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in _PANELS}
    epochs: list[tuple[float, float]] = []  # with the steps, of the rows that are drawn
    for row in rows:
        found, result = numbers(row), numbers(row.get("evaluation"))
        step, epoch = found.pop("step", None), found.pop("epoch", None)
        found |= {f"evaluation {key}": result[key] for key in ("mAP", "mAP_stepwise", "rank1") if key in result}
        found = {key: value for key, value in found.items() if re.fullmatch(keys, key)}
        if step is None or not found:
            continue
        epochs += [] if epoch is None else [(step, epoch)]
        for key, value in found.items():
            name = next((name for name, these in _PANELS.items() if re.fullmatch(these, key)), key.replace("_", " "))
            panels.setdefault(name, {}).setdefault(key, []).append((step, value))
    drawn = [
        name
        for name, curves in panels.items()
        if any(name in _PANELS or any(value for _, value in points) for points in curves.values())
    ][:MAX_PANELS]
    if not drawn:
        return None
    columns = 2 if len(drawn) == 4 else min(len(drawn), 3)
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(max(3.3 * columns, 5.2), 2.3 * lines))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    source_only = [step for step, epoch in epochs if epoch < 0]
    for axes, name in zip(grid, drawn, strict=False):
        axes.set_title(name)
        for key, points in panels[name].items():
            if len(points) > MAX_POINTS:
                points = [tuple(part.mean(axis=0)) for part in np.array_split(np.array(points), MAX_POINTS)]
            label = key.removeprefix("evaluation ").replace("_", " ")
            axes.plot(*np.array(points).T, label=label, marker="o" if len(points) <= 30 else None)
        if (count := len(panels[name])) > 1:
            bottom, top = axes.get_ylim()
            axes.set_ylim(top=top + 0.15 * max(2, -(-count // 2)) * (top - bottom))  # so that the legend hides no curve
            axes.legend(loc="upper right", ncols=2, columnspacing=1.0, handlelength=1.6, fontsize=7)
        if source_only:
            first, end = min(source_only), min((step for step, epoch in epochs if epoch >= 0), default=max(source_only))
            axes.axvspan(first, end, color=FAINT_INK, alpha=0.1, linewidth=0)
            if name == drawn[0]:
                axes.text(first, 0.02, "source only", transform=axes.get_xaxis_transform(), fontsize=7, va="bottom")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return figure
