"""What every picture shares: paper, ink, signs, a sheet to lay pictures of people on, and how a figure is saved.

Figures are made from `matplotlib.figure.Figure` alone: no pyplot, no global state, no window system. Colours keep apart
for colour-blind readers (Okabe and Ito 2008; Tol 2021), and none is the only carrier of a meaning.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DPI = 150
PAPER = "#fcfcfa"
INK = "#1f2328"
FAINT_INK = "#667079"
GRID = "#e3e4e0"
NEUTRAL = "#4c5866"
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": INK, "fontweight": "bold"}
RIGHT = "#009e73"
WRONG = "#cc3311"
# Lines are told apart by dash as well as by colour.
SERIES = ("#0b6fa8", "#d1670a", "#00845f", "#8a4f9e", "#6b6b6b", "#a8790a")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))

Verdict = Literal["right", "wrong"]


def new_axes(
    figure: Figure, position: int | tuple[int, int, int], title: str = "", xlabel: str = "", ylabel: str = ""
) -> Axes:
    """An axes of `figure` in the project's plain style: title at the left, light grid, no box."""
    axes = figure.add_subplot(*(position if isinstance(position, tuple) else (position,)))
    axes.set_facecolor(PAPER)
    axes.set_title(title, **TITLE)
    axes.set_xlabel(xlabel, fontsize=8.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, color=GRID, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT_INK)
    return axes


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches on the project's paper."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
    return figure


def series_style(position: int) -> dict:
    """Colour and dash of the `position`-th line of a plot."""
    return {"color": SERIES[position % len(SERIES)], "linestyle": DASHES[position % len(DASHES)], "linewidth": 1.6}


class Sheet:
    """Pictures and words laid out on one figure; all positions in inches from its upper left corner."""

    MARGIN = 0.2

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
        self._axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_xlim(0.0, width)
        self._axes.set_ylim(height, 0.0)
        self._axes.set_axis_off()
        self._axes.autoscale(False)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 7.5,
        color: str = INK,
        bold: bool = False,
        align: Literal["left", "center", "right"] = "left",
        rotation: float = 0.0,
        anchor: Literal["top", "center", "baseline"] = "top",
    ) -> None:
        """Write `words` with their upper edge (or centre, or baseline) at `y`. A dollar sign is only a dollar sign."""
        weight = "bold" if bold else "normal"
        self._axes.text(
            x,
            y,
            words,
            fontsize=size,
            color=color,
            fontweight=weight,
            ha=align,
            va=anchor,
            rotation=rotation,
            parse_math=False,
            linespacing=1.35,
        )

    def heading(self, title: str, subtitle: str = "") -> None:
        """The sheet's title and a line below it."""
        self.text(self.MARGIN, 0.14, title, size=11, bold=True)
        self.text(self.MARGIN, 0.38, subtitle, size=8, color=FAINT_INK)

    def picture(
        self,
        image: Image.Image,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        verdict: Verdict | None = None,
        frame: str | None = None,
    ) -> None:
        """Show `image` whole, in its own proportions, in the cell with upper left corner (x, y).

        A verdict frames the cell: right in solid green with a tick, wrong in dashed red with a cross. `frame` is a
        colour for a plain frame.
        """
        left, top, columns, lines = (round(value * DPI) for value in (x, y, width, height))  # whole pixels stay sharp
        pixels = _fitted(image, columns, lines)
        spare_x, spare_y = columns - pixels.shape[1], lines - pixels.shape[0]
        left_edge, top_edge = left + spare_x // 2, top + spare_y // 2
        extent = (left_edge, left_edge + pixels.shape[1], top_edge + pixels.shape[0], top_edge)
        self._axes.imshow(
            pixels, extent=tuple(edge / DPI for edge in extent), aspect="auto", interpolation="nearest", zorder=2
        )
        if verdict is not None or frame is not None:
            color = frame if verdict is None else (RIGHT if verdict == "right" else WRONG)
            dashes = (0, (2.2, 1.1)) if verdict == "wrong" else "-"
            self._rectangle(x, y, width, height, edgecolor=color, linewidth=2.0, linestyle=dashes)
        if verdict is not None:
            self._sign(x + 0.015, y + 0.015, verdict)

    def no_picture(self, x: float, y: float, width: float, height: float, words: str = "") -> None:
        """An empty cell, with the reason in it."""
        self._rectangle(x, y, width, height, edgecolor=GRID, linewidth=1.0, linestyle="-")
        self.text(x + width / 2, y + height / 2, words, size=6.5, color=FAINT_INK, align="center", anchor="center")

    def rule(self, y: float, start: float, end: float) -> None:
        """A thin line across."""
        self._axes.plot((start, end), (y, y), color=GRID, linewidth=0.9, zorder=1)

    def legend(self, x: float, y: float, *, query: bool = True) -> None:
        """What the frames mean, in one line."""
        signs: list[tuple[Verdict | None, str]] = [("right", "same person"), ("wrong", "another person")]
        if query:
            signs.insert(0, (None, "query"))
        for verdict, words in signs:
            if verdict is None:
                self._rectangle(x, y, 0.14, 0.14, edgecolor=NEUTRAL, linewidth=2.0, linestyle="-")
            else:
                self._sign(x + 0.07, y + 0.07, verdict)
            self.text(x + 0.21, y + 0.075, words, size=7.5, anchor="center")
            x += 0.36 + 0.062 * len(words)

    def _rectangle(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        self._axes.add_patch(Rectangle((x, y), width, height, fill=False, zorder=3, joinstyle="miter", **style))

    def _sign(self, x: float, y: float, verdict: Verdict) -> None:
        """A disc with a tick or a cross, drawn as lines so that no font need have the sign."""
        self._axes.add_patch(
            Circle((x, y), 0.072, color=RIGHT if verdict == "right" else WRONG, zorder=4, linewidth=0.0)
        )
        strokes: Sequence[Sequence[tuple[float, float]]] = (
            [[(-0.034, 0.004), (-0.010, 0.028), (0.036, -0.026)]]
            if verdict == "right"
            else [[(-0.026, -0.026), (0.026, 0.026)], [(-0.026, 0.026), (0.026, -0.026)]]
        )
        for stroke in strokes:
            across, down = zip(*stroke, strict=True)
            self._axes.plot(
                [x + dx for dx in across],
                [y + dy for dy in down],
                color="white",
                linewidth=1.3,
                solid_capstyle="round",
                zorder=5,
            )


def _fitted(image: Image.Image, columns: int, lines: int) -> np.ndarray:
    """`image` as RGB pixels, as large as fits in `columns` x `lines`, in its own proportions."""
    scale = min(columns / image.width, lines / image.height)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure as (H, W, 3) uint8 pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_pixels(pixels: np.ndarray, path: str | os.PathLike[str], *, title: str, caption: str) -> Path:
    """Write a drawn figure as a PNG that carries its own title and caption; complete or not there.

    The words stand in the PNG's text fields (Title, Description), where the report finds them; any viewer of PNG
    metadata shows them too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = PngInfo()
    words.add_itxt("Title", title)
    words.add_itxt("Description", caption)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Light compression: small pictures shown large are noise to it, and more effort gains little.
        Image.fromarray(pixels).save(unfinished, format="PNG", pnginfo=words, compress_level=3, dpi=(DPI, DPI))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def save_figure(figure: Figure, path: str | os.PathLike[str], *, title: str, caption: str) -> Path:
    """Draw `figure` and `save_pixels` of it."""
    return save_pixels(pixels_of(figure), path, title=title, caption=caption)
