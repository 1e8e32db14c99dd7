"""Reading what a run left behind: config.yaml, metrics.jsonl, summary.json and the pictures in figures/.

A run that is going on, or was killed, has only some of them: what is not there is None or empty; what is there and
cannot be read is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from ecn_dist.errors import UserError

CONFIG, METRICS, SUMMARY, FIGURES = "config.yaml", "metrics.jsonl", "summary.json", "figures"


@dataclass(frozen=True)
class FigureFile:
    """A PNG of figures/, with the words that it carries in its text fields."""

    path: Path
    title: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class RunFolder:
    """The parts of a run folder that are meant for reading."""

    path: Path
    config: Mapping[str, Any] | None
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] | None
    figures: tuple[FigureFile, ...]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The result at the end of the run; empty where there is none."""
        found = (self.summary or {}).get("evaluation")
        return found if isinstance(found, Mapping) else {}


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder. Raises `UserError` where it is no run folder, or a file in it is broken."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give a run folder, the --output_dir of `train`")
    config, summary = _mapping(path / CONFIG, yaml.safe_load), _mapping(path / SUMMARY, json.loads)
    metrics = tuple(read_metrics(path / METRICS))
    figures = tuple(read_figure(file) for file in sorted((path / FIGURES).glob("*.png")))
    if config is None and summary is None and not metrics and not figures:
        raise UserError(
            f"{path}: is no run folder, as it has none of {CONFIG}, {METRICS}, {SUMMARY} and {FIGURES}/*.png; "
            "give the --output_dir of `train`"
        )
    return RunFolder(path, config, metrics, summary, figures)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in the order of their steps; empty where there is no file.

    A resumed run logs some steps again: the later line counts, key by key. A last line that is cut off, as a kill in
    mid-write leaves it, is left out; a broken line before it raises `UserError`.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    by_step: dict[float, dict[str, Any]] = {}
    without_step = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is no JSON object ({error}); remove that line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; remove that line")
        if isinstance(row.get("step"), int | float):
            by_step.setdefault(row["step"], {}).update(row)
        else:
            without_step.append(row)
    return [by_step[step] for step in sorted(by_step)] + without_step


def read_figure(path: Path) -> FigureFile:
    """A PNG and its words; a PNG without words is called by its file name."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            words: Mapping[str, Any] = getattr(image, "text", {})
            title = str(words.get("Title") or path.stem.replace("_", " "))
            return FigureFile(path, title, str(words.get("Description") or ""), *image.size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: is no readable PNG ({error}); remove it, or draw it again") from error


def _mapping(path: Path, parse: Any) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: holds no mapping of keys to values, but a {type(value).__name__}")
    return value
