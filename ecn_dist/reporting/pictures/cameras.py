"""The result by camera pair, as a heat map.

Shape letters: C cameras; the first C of a table is the query's camera, the second the gallery's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ecn_dist.errors import UserError
from ecn_dist.reporting.pictures.canvas import FAINT_INK, INK, PAPER, new_axes, new_figure

_COLORS = "cividis"  # even in lightness, and the same to colour-blind readers


class CameraPair(NamedTuple):
    """One entry of a table by camera pair."""

    query_camera: int
    gallery_camera: int
    value: float
    num_queries: int | None


def weakest_camera_pairs(
    values_CC: np.ndarray, counts_CC: np.ndarray | None = None, cameras: Sequence[int] | None = None, count: int = 3
) -> list[CameraPair]:
    """The `count` lowest entries that are not NaN, lowest first."""
    values = np.asarray(values_CC, dtype=np.float64)
    names = list(cameras) if cameras is not None else list(range(len(values)))
    order = np.argsort(np.where(np.isnan(values), np.inf, values), axis=None, kind="stable")
    pairs = [divmod(int(flat), len(values)) for flat in order[:count]]
    return [
        CameraPair(names[q], names[g], float(values[q, g]), None if counts_CC is None else int(counts_CC[q][g]))
        for q, g in pairs
        if not np.isnan(values[q, g])
    ]


def draw_camera_pairs(
    values_CC: np.ndarray,
    counts_CC: np.ndarray | None = None,
    *,
    cameras: Sequence[int] | None = None,
    measure: str = "mAP",
) -> Figure:
    """`values_CC` (fractions; NaN: no query of that pair has a true match) as percentages on colour.

    `counts_CC`: how many queries each entry stands on, written small below it. `cameras` names rows and columns
    (camids; 0..C-1 where left out).
    """
    values = np.asarray(values_CC, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise UserError(f"camera pairs: a square table is needed, not one of shape {values.shape}")
    num_cameras = len(values)
    names = list(cameras) if cameras is not None else list(range(num_cameras))
    cell = 0.62 if num_cameras <= 8 else 0.46
    side = max(num_cameras * cell, 2.2)
    figure = new_figure(side + 1.9, side + 1.15)
    axes = new_axes(figure, 111, f"{measure} by camera pair, percent", "camera of the gallery", "camera of the query")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    colormap = matplotlib.colormaps[_COLORS].with_extremes(bad=PAPER)
    image = axes.imshow(np.ma.masked_invalid(100 * values), vmin=0.0, vmax=100.0, cmap=colormap)
    axes.set_xticks(range(num_cameras), [str(name) for name in names])
    axes.set_yticks(range(num_cameras), [str(name) for name in names])
    size = 9 if num_cameras <= 8 else 7
    for (query, gallery), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(gallery, query, "-", ha="center", va="center", fontsize=size, color=FAINT_INK)
            continue
        ink = "white" if value < 0.55 else INK
        counted = counts_CC is not None and num_cameras <= 8
        axes.text(
            gallery,
            query - (0.1 if counted else 0.0),
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=size,
            color=ink,
            fontweight="bold",
        )
        if counted and counts_CC is not None:
            axes.text(
                gallery,
                query + 0.24,
                f"n {counts_CC[query][gallery]:,}",
                ha="center",
                va="center",
                fontsize=6,
                color=ink,
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=22, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=0, labelcolor=INK)
    return figure
