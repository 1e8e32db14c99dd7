"""One self-contained report.html of a run: what was trained, how well it does, where it fails.

The page needs nothing but itself: pictures are inlined, there is no script, and its Content-Security-Policy forbids
any request. Whatever comes from files is escaped by the template engine.
"""

import base64
import io
import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, features

from ecn_dist import __version__
from ecn_dist.config_gate import flat
from ecn_dist.errors import UserError, printable
from ecn_dist.files import write_atomically
from ecn_dist.reporting import words
from ecn_dist.reporting.run_reader import FIGURES, REPORT, read_mapping, read_run

COMPARISON, FINDINGS = "comparison.json", "findings.json"
MAX_PIXELS = 40_000_000  # of a picture
_PARTS = {
    "trained": "What was trained",
    "result": "How well it does",
    "failures": "Where it fails",
    "lists": "Ranked lists",
    "clusters": "Clusters",
    "training": "Training",
    "data": "Data",
    "more": "More pictures",
    "configuration": "Configuration",
    "machine": "Machine",
}
_OPTIONAL = ("lists", "clusters", "data", "more")  # left out where they have no picture
_LISTS = "The query, then its nearest gallery pictures."
# The pictures in their order: part of the page, title, and what is not said in the picture itself.
_FIGURES = {
    "cmc": (
        "result",
        "CMC, and precision and recall",
        "Left: the queries with a true match among the nearest k. Right: the highest precision at a recall or beyond, "
        "mean over the queries.",
    ),
    "failures": (
        "failures",
        "Failures",
        "Each time: a query, what came first instead of the right person, and the best placed true match; with ranks.",
    ),
    "camera_pairs": (
        "failures",
        "mAP by camera pair",
        "Queries of one camera among the gallery pictures of one other. n: queries that have a true match there.",
    ),
    "ranked_worst": ("failures", "Ranked lists of the worst queries", _LISTS),
    "ranked_best": ("lists", "Ranked lists of the best queries", _LISTS),
    "ranked_random": ("lists", "Ranked lists of random queries", _LISTS),
    "clusters_by_step": ("clusters", "How the clusters formed", "Each epoch clusters the features of that time."),
    "clusters": (
        "clusters",
        "Clusters of the last epoch",
        "Each line is some of one cluster: the largest, the smallest, and mixed ones, which take several people "
        "for one (where people are not known: those with the most pairs of pictures by two cameras). Split: each line "
        "is one person, taken for several. Last: pictures in no cluster.",
    ),
    "training": ("training", "Training", "From metrics.jsonl. Long curves are shown as means of equal parts."),
    "domains": ("data", "The domains by camera", "Training pictures."),
    "style_copies": ("data", "Style copies", "Training pictures in the style of the other cameras."),
    "styles": ("data", "Camera styles", "What a training of camera styles drew."),
}
_CURVES = {"training": r"(?!cluster|outliers).*", "clusters_by_step": r"cluster.*|outliers"}  # of which metrics


def write_report(
    run_folder: str | Path, *, comparison: words.Comparison | None = None, output: str | Path | None = None
) -> Path:
    """Write the report of a run, complete or not at all. Its curves are drawn anew from metrics.jsonl.

    Args:
        run_folder: as `train` leaves it, finished or not; the other pictures are those of its figures/.
        comparison: kept as RUN/comparison.json, so that a later report of the run shows it too.
        output: where to write, by default RUN/report.html; with it nothing is written into the run.

    Returns:
        The report's path.

    Raises:
        UserError: for a folder that is no run folder, and for a file in it that cannot be read.
    """
    from ecn_dist.reporting.curves import draw_training_curves  # matplotlib: a tenth of the time that a command starts
    from ecn_dist.reporting.montage import png_of

    path = Path(run_folder)
    run, rows = read_run(path), _kept_comparison(path / COMPARISON) if comparison is None else comparison
    figures = {file.stem: file.read_bytes() for file in sorted((path / FIGURES).glob("*.png"))}
    for name, keys in _CURVES.items():
        if drawn := draw_training_curves(run.metrics, keys):
            figures[name] = png_of(drawn)
    pictures: dict[str, list[dict[str, Any]]] = {part: [] for part in _PARTS}
    for name in [*_FIGURES, *(name for name in figures if name not in _FIGURES)]:
        part, title, caption = _FIGURES.get(name, ("more", name.replace("_", " "), ""))
        if name in figures:
            pictures[part].append(_inlined(name, figures[name]) | {"name": name, "title": title, "caption": caption})
    config = flat(run.config)
    page = template("report.html.j2", escape=True).render(
        name=path.resolve().name,
        css=resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
        version=__version__,
        titles={part: title for part, title in _PARTS.items() if pictures[part] or part not in _OPTIONAL},
        words=words,
        run=run,
        config=config,
        options=[(key, words.shown(value)) for key, value in config.items()],
        findings=read_mapping(path / FIGURES / FINDINGS) or {},
        comparison=words.compared(rows) if rows else None,
        pictures=pictures,
    )
    if output is None and comparison is not None:
        write_atomically(path / COMPARISON, json.dumps({"rows": comparison}, indent=1) + "\n")
    return write_atomically(path / REPORT if output is None else output, page)


def _kept_comparison(path: Path) -> words.Comparison | None:
    """What an earlier report kept."""
    try:
        found = read_mapping(path)
        return None if found is None else {name: list(runs) for name, runs in found["rows"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no comparison ({error}); remove it") from error


def template(name: str, *, escape: bool) -> jinja2.Template:
    """A template of this package. Names from data may be in any text: what cannot be printed is escaped."""
    environment = jinja2.Environment(
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.from_string(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _inlined(name: str, data: bytes) -> dict[str, Any]:
    """A PNG, which is looked at whole: its size, and a URI of it or of a WebP where that is smaller, as of photographs.

    Raises `UserError` where it is none, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{FIGURES}/{name}.png: is no readable PNG ({error}); remove it, or draw it again") from error
    kind, webp = "png", io.BytesIO()
    if features.check("webp"):
        image.convert("RGB").save(webp, format="WEBP", quality=90)
        if len(webp.getvalue()) < len(data) / 2:
            kind, data = "webp", webp.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"width": image.width, "height": image.height, "uri": uri}
