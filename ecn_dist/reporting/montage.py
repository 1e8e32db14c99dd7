"""Pictures of people in rows, with words: ranked lists, failures, answers, domains and style copies are all of these.

Figures are made from `matplotlib.figure.Figure` alone: no window system. Colours keep apart for colour-blind readers
(Okabe and Ito 2008), and none is the only carrier of a meaning.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

DPI = 150
PAPER, INK, FAINT_INK = "#fcfcfa", "#1f2328", "#667079"
Verdict = Literal["", "query", "right", "wrong"]
FRAMES: dict[Verdict, tuple[str, str, str]] = {  # colour, dashes, sign
    "query": ("#4c5866", "-", ""),
    "right": ("#009e73", "-", "✓ "),
    "wrong": ("#cc3311", "--", "✗ "),
}
LEGEND = "✓ solid frame: the same person; ✗ dashed frame: another person."
_WIDTH, _HEIGHT, _GAP, _LINE, _LABEL, _EDGE = 0.74, 1.48, 0.1, 0.14, 1.05, 0.1  # inches, of a cell and around it


@dataclass(frozen=True)
class Cell:
    """A picture and up to two lines of words below it, in a frame of `color`; without a picture, the words alone.

    A verdict has a colour of its own.
    """

    picture: Image.Image | None = None
    words: str = ""
    verdict: Verdict = ""
    color: str = "none"


@dataclass(frozen=True)
class Row:
    """Cells with words at their left, up to five lines."""

    words: str
    cells: Sequence[Cell]


def montage(rows: Sequence[Row], *, title: str, subtitle: str = "", heads: Sequence[str] = ()) -> Figure:
    """The rows below each other, each picture whole in its own proportions. `heads` stand above the columns."""
    columns = max([1, *(len(row.cells) for row in rows)])
    below = [cell.words.count("\n") + 1 for row in rows for cell in row.cells if cell.words and cell.picture]
    words = _LINE * (1 + max(below, default=0))
    left = _LABEL if any(row.words for row in rows) else _EDGE
    right = left + columns * (_WIDTH + _GAP) - _GAP
    width = max(right + 2 * _EDGE, 5.2)
    lines = textwrap.wrap(subtitle, round(15 * width))
    top = 0.5 + 0.16 * len(lines) + (0.22 if heads else 0.0)
    height = top + max(len(rows), 1) * (_HEIGHT + words) + _EDGE
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    edge = 1.5 * _EDGE / width
    figure.text(edge, 1 - 0.12 / height, title, fontsize=11, fontweight="bold", color=INK, va="top")
    about: Any = {"va": "top", "parse_math": False}
    figure.text(edge, 1 - 0.38 / height, "\n".join(lines), fontsize=8, color=FAINT_INK, **about)
    bottom, spaces = (_EDGE + words) / height, {"wspace": _GAP / _WIDTH, "hspace": words / _HEIGHT}
    sides = {"left": left / width, "right": right / width, "top": 1 - top / height, "bottom": bottom}
    grid = figure.add_gridspec(max(len(rows), 1), columns, **sides, **spaces)
    for line, row in enumerate(rows):
        at = grid[line, 0].get_position(figure).y1
        figure.text(edge, at, row.words, fontsize=7, color=INK, linespacing=1.4, **about)
        for column, cell in enumerate(row.cells):
            axes = figure.add_subplot(grid[line, column], xticks=[], yticks=[], facecolor=PAPER)
            if line == 0 and column < len(heads):
                axes.set_title(heads[column], fontsize=8, fontweight="bold", color=INK)
            color, dashes, sign = FRAMES.get(cell.verdict, (cell.color, "-", ""))
            for spine in axes.spines.values():
                spine.set(color=color, linestyle=dashes, linewidth=2.0)
            if cell.picture is None:
                axes.text(0.5, 0.5, cell.words, size=7, color=FAINT_INK, ha="center", va="center", parse_math=False)
            else:
                axes.imshow(np.asarray(cell.picture.convert("RGB")))
                axes.set_xlabel(sign + cell.words, fontsize=6.5, color=INK, linespacing=1.3, parse_math=False)
    return figure


def png_of(figure: Figure) -> bytes:
    """The drawn figure. Light compression: pictures shown large are noise to it, and more effort gains little."""
    data = io.BytesIO()
    figure.savefig(data, format="png", pil_kwargs={"compress_level": 3})
    return data.getvalue()
