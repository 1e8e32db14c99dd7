"""The sheet of a search: each query with the pictures that answer it. Who is on them is not known, so none is right or
wrong."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.reporting.pictures.canvas import FAINT_INK, NEUTRAL, Sheet

_CELL_WIDTH, _CELL_HEIGHT = 0.8, 1.6
_STEP = _CELL_WIDTH + 0.12
_ROW_HEIGHT = _CELL_HEIGHT + 0.5
_HEAD = 0.72
_GAP = 0.16  # between the query and its answers
_LONGEST_NAME = 16

Answer = tuple[str, float, Image.Image]


def draw_answers(queries: Sequence[tuple[str, Image.Image, Sequence[Answer]]], *, subtitle: str = "") -> Figure:
    """One row a query: its name and picture, then each answer's picture with its rank, distance and name."""
    columns = max((len(answers) for _, _, answers in queries), default=0)
    width = 2 * Sheet.MARGIN + _STEP + _GAP + columns * _STEP
    sheet = Sheet(max(width, 4.2), _HEAD + len(queries) * _ROW_HEIGHT)
    sheet.heading("Nearest pictures", subtitle)
    for line, (name, picture, answers) in enumerate(queries):
        x, y = Sheet.MARGIN, _HEAD + line * _ROW_HEIGHT
        sheet.picture(picture, x, y, _CELL_WIDTH, _CELL_HEIGHT, frame=NEUTRAL)
        _words(sheet, x, y, "query", name)
        x += _STEP + _GAP
        for rank, (answer, distance, shown) in enumerate(answers, start=1):
            sheet.picture(shown, x, y, _CELL_WIDTH, _CELL_HEIGHT)
            _words(sheet, x, y, f"{rank}: {distance:.3f}", answer)
            x += _STEP
    return sheet.figure


def _words(sheet: Sheet, x: float, y: float, words: str, name: str) -> None:
    short = name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
    center = x + _CELL_WIDTH / 2
    sheet.text(center, y + _CELL_HEIGHT + 0.05, words, size=7, align="center", bold=words == "query")
    sheet.text(center, y + _CELL_HEIGHT + 0.2, short, size=6, align="center", color=FAINT_INK)
