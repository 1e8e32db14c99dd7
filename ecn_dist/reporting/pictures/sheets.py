"""Sheets of the data itself: both domains by camera, and style copies.

Letters: C cameras, n pictures a camera.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.reporting.pictures.canvas import FAINT_INK, NEUTRAL, Sheet

NO_PICTURE = -1
MAX_CAMERAS = 8  # more do not fit a page; the sheet says how many it leaves out

ReadCopy = Callable[[int, int], Image.Image | None]


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain, by row. Where no pid is known (None, or all below 0) its columns are no persons."""

    name: str
    camids: np.ndarray
    read: Callable[[int], Image.Image]
    pids: np.ndarray | None = None

    @property
    def known_pids(self) -> np.ndarray | None:
        """The pids, None where no picture has one."""
        return None if self.pids is None or not (np.asarray(self.pids) >= 0).any() else np.asarray(self.pids)


def pick_by_camera(
    camids: np.ndarray, pids: np.ndarray | None, cameras: Sequence[int], count: int, seed: int
) -> np.ndarray:
    """(C, n) rows to show, `NO_PICTURE` where there is none.

    With pids a column is one person: those whom most of `cameras` have seen come first, equals in a random order. So
    what differs down a column is the camera. Without pids every cell is any picture of its camera.
    """
    random = np.random.default_rng(seed)
    rows = np.full((len(cameras), count), NO_PICTURE, dtype=np.int64)
    order = random.permutation(len(camids))
    if pids is None:
        for line, camera in enumerate(cameras):
            of_camera = order[camids[order] == camera][:count]
            rows[line, : len(of_camera)] = of_camera
        return rows
    seen: dict[int, dict[int, int]] = {}
    for row in order[pids[order] >= 0].tolist():
        seen.setdefault(int(pids[row]), {}).setdefault(int(camids[row]), row)
    wanted = list(cameras)
    people = sorted(seen.values(), key=lambda by_camera: -sum(camera in by_camera for camera in wanted))  # stable
    for column, by_camera in enumerate(people[:count]):
        for line, camera in enumerate(wanted):
            rows[line, column] = by_camera.get(camera, NO_PICTURE)
    return rows


def spread(cameras: Sequence[int], most: int = MAX_CAMERAS) -> list[int]:
    """At most `most` of `cameras`, evenly spaced."""
    if len(cameras) <= most:
        return list(cameras)
    return [cameras[round(i * (len(cameras) - 1) / (most - 1))] for i in range(most)]


_CELL_WIDTH, _CELL_HEIGHT = 0.52, 1.04
_STEP_X, _STEP_Y = _CELL_WIDTH + 0.06, _CELL_HEIGHT + 0.08
_CAMERA_WIDTH = 0.56
_GAP = 0.4


def draw_domains(domains: Sequence[Domain], *, per_camera: int = 8, seed: int = 0) -> Figure:
    """The domains side by side, one line a camera; where pids are known, one column is one person."""
    cameras = [sorted(set(np.asarray(domain.camids).tolist())) for domain in domains]
    shown = [spread(found) for found in cameras]
    block = _CAMERA_WIDTH + per_camera * _STEP_X
    lines = max((len(found) for found in shown), default=1)
    sheet = Sheet(2 * Sheet.MARGIN + len(domains) * block + (len(domains) - 1) * _GAP, 1.12 + lines * _STEP_Y)
    people = all(domain.known_pids is not None for domain in domains)
    sheet.heading(
        "The domains by camera",
        "A line is a camera" + (", a column one person: what differs down a column is the camera." if people else "."),
    )
    for position, domain in enumerate(domains):
        x = Sheet.MARGIN + position * (block + _GAP)
        left_out = len(cameras[position]) - len(shown[position])
        some = f", {len(shown[position])} of {len(cameras[position])} cameras" if left_out else ""
        sheet.text(x, 0.72, domain.name, size=9.5, bold=True)
        sheet.text(x + block, 0.74, f"{len(domain.camids):,} pictures{some}", size=7.5, color=FAINT_INK, align="right")
        rows = pick_by_camera(np.asarray(domain.camids), domain.known_pids, shown[position], per_camera, seed)
        for line, camera in enumerate(shown[position]):
            y = 1.0 + line * _STEP_Y
            sheet.text(x, y + _CELL_HEIGHT / 2, f"cam {camera}", size=7.5, anchor="center")
            for column, row in enumerate(rows[line].tolist()):
                cell = (x + _CAMERA_WIDTH + column * _STEP_X, y, _CELL_WIDTH, _CELL_HEIGHT)
                if row == NO_PICTURE:
                    sheet.no_picture(*cell)
                else:
                    sheet.picture(domain.read(row), *cell)
    return sheet.figure


def draw_style_copies(
    domain: Domain, read_copy: ReadCopy, *, count: int = 6, seed: int = 0, cameras: Sequence[int] | None = None
) -> Figure:
    """One line a picture: the original, then its copy in each camera's style.

    `read_copy(row, camera)` gives the copy, or None where there is none; it is not asked for a picture's own camera.
    The originals go round the cameras.
    """
    camids = np.asarray(domain.camids)
    all_cameras = sorted(set(camids.tolist())) if cameras is None else list(cameras)
    shown = spread(all_cameras)
    rows = _originals(camids, domain.known_pids, shown, count, seed)
    left = Sheet.MARGIN + 0.62
    styles_left = left + 0.8 + 0.16
    sheet = Sheet(styles_left + len(shown) * (0.66 + 0.08) + Sheet.MARGIN, 1.18 + max(len(rows), 1) * (1.32 + 0.1))
    sheet.heading(f"Style copies: {domain.name}", "Each original, and its copies in the style of the other cameras.")
    sheet.text(left + 0.33, 0.78, "original", size=8, bold=True, align="center")
    for position, camera in enumerate(shown):
        sheet.text(styles_left + position * 0.74 + 0.33, 0.78, f"cam {camera}", size=8, bold=True, align="center")
    for line, row in enumerate(rows):
        y = 1.02 + line * 1.42
        own = int(camids[row])
        sheet.text(Sheet.MARGIN, y + 0.66, f"cam {own}", size=7.5, anchor="center")
        sheet.picture(domain.read(row), left, y, 0.66, 1.32, frame=NEUTRAL)
        for position, camera in enumerate(shown):
            cell = (styles_left + position * 0.74, y, 0.66, 1.32)
            copy = None if camera == own else read_copy(row, camera)
            if copy is None:
                sheet.no_picture(*cell, words="its own\ncamera" if camera == own else "no copy")
            else:
                sheet.picture(copy, *cell)
    return sheet.figure


def _originals(camids: np.ndarray, pids: np.ndarray | None, cameras: Sequence[int], count: int, seed: int) -> list[int]:
    """Up to `count` rows, one camera after another, each of another person where that is known."""
    order = np.random.default_rng(seed).permutation(len(camids)).tolist()
    chosen: list[int] = []
    people: set[int] = set()
    for turn in range(count):
        camera = cameras[turn % len(cameras)]
        for row in order:
            person = row if pids is None else int(pids[row])
            if camids[row] == camera and row not in chosen and person not in people:
                chosen.append(row)
                people.add(person)
                break
    return chosen


def by_camera(pictures: Mapping[int, Sequence[Image.Image]], name: str) -> Domain:
    """A `Domain` of pictures at hand, given by camera."""
    flat = [(camera, picture) for camera in sorted(pictures) for picture in pictures[camera]]
    return Domain(name, np.array([camera for camera, _ in flat], dtype=np.int64), lambda row: flat[row][1])
