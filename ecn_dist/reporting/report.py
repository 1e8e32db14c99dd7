"""One self-contained report.html of a run: what was trained, how well it does, where it fails.

The page needs nothing but itself: pictures are inlined, there is no script, and its Content-Security-Policy forbids
any request. Whatever comes from files is escaped by the template engine.
"""

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, features

from ecn_dist import __version__
from ecn_dist.errors import UserError
from ecn_dist.reporting import words
from ecn_dist.reporting.comparison import Comparison, comparison_table, read_comparison
from ecn_dist.reporting.pictures.run import FINDINGS, FigureFolder, write_training_figure
from ecn_dist.reporting.run_reader import FIGURES, FigureFile, RunFolder, read_run

REPORT, COMPARISON = "report.html", "comparison.json"

# Which figures stand in which part of the page, in this order; the rest come last.
_PLACES = {
    "result": ("cmc", "precision_recall"),
    "failures": ("failures", "camera_pairs", "ranked_worst"),
    "lists": ("ranked_best", "ranked_random"),
    "training": ("training",),
    "data": ("domains", "style_copies"),
}


def write_report(
    run_folder: str | Path, *, comparison: Comparison | None = None, output: str | Path | None = None
) -> Path:
    """Write the report of `run_folder` (by default RUN/report.html) and return its path; complete or not there.

    The training curves are drawn anew from metrics.jsonl; the other pictures are those of RUN/figures/. `comparison`
    is kept as RUN/comparison.json, so that a later report of the run shows it too. Raises `UserError` for a folder
    that is no run folder, and for a file in it that cannot be read.
    """
    path = Path(run_folder)
    has_metrics = bool(read_run(path).metrics)
    kept = comparison or read_comparison(path / COMPARISON)
    if has_metrics:
        write_training_figure(FigureFolder(path), path)
    if comparison is not None:
        _write(path / COMPARISON, json.dumps(asdict(comparison), indent=1) + "\n")
    return _write(Path(output) if output is not None else path / REPORT, render_report(read_run(path), kept))


def render_report(run: RunFolder, comparison: Comparison | None = None) -> str:
    """The report's HTML."""
    findings = _read_findings(run.path / FIGURES / FINDINGS)
    figures = {figure.path.stem: figure for figure in run.figures}
    placed = {
        place: [_picture(figures.pop(name)) for name in names if name in figures] for place, names in _PLACES.items()
    }
    config = words.flat(run.config or {})
    return _template().render(
        name=run.path.resolve().name,
        css=resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
        version=__version__,
        state=words.state(run),
        method=words.method(config),
        trained=words.trained(config),
        headline=words.headline(run.evaluation),
        measures=words.measures(run.evaluation),
        num_queries=words.count(run.evaluation.get("num_valid_queries")),
        failures=words.failures(run.evaluation, findings),
        comparison=None if comparison is None else comparison_table(comparison),
        training=words.training(run),
        machine=words.machine(run, config),
        config=[(key, words.shown(value)) for key, value in config.items()],
        pictures=placed,
        more_pictures=[_picture(figure) for figure in figures.values()],
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))


def _read_findings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no findings, but a {type(found).__name__}; remove it")
    return found


def _picture(figure: FigureFile) -> dict[str, Any]:
    kind, data = _smallest(figure.path)
    return {
        "name": figure.path.stem,
        "title": figure.title,
        "caption": figure.caption,
        "uri": f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}",
        "width": figure.width,
        "height": figure.height,
    }


def _smallest(path: Path) -> tuple[str, bytes]:
    """The picture as it is, or as WebP where that is smaller: sheets of photographs shrink to a fifth."""
    as_png = path.read_bytes()
    if not features.check("webp"):
        return "png", as_png
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, format="WEBP", quality=90)
    as_webp = buffer.getvalue()
    return ("webp", as_webp) if len(as_webp) < len(as_png) / 2 else ("png", as_png)


def _write(path: Path, text: str) -> Path:
    """Write `text` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
