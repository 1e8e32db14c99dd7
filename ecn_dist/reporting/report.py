"""One self-contained report.html of a run: what was trained, how well it does, where it fails.

The page needs nothing but itself: pictures are inlined, there is no script, and its Content-Security-Policy forbids
any request. Whatever comes from files is escaped by the template engine.
"""

import base64
import io
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import jinja2
from PIL import Image, features

from ecn_dist import __version__
from ecn_dist.files import write_atomically
from ecn_dist.reporting import words
from ecn_dist.reporting.comparison import Comparison, comparison_table, read_comparison
from ecn_dist.reporting.curves import draw_training_curves
from ecn_dist.reporting.montage import pixels_of, png_of
from ecn_dist.reporting.run_reader import FIGURES, REPORT, FigureFile, RunFolder, read_figure, read_mapping, read_run

COMPARISON, FINDINGS = "comparison.json", "findings.json"
TRAINING = ("Training", "From metrics.jsonl. Long curves are shown as means of equal parts.")
# The parts of the page, and which figures stand in them; all others stand in "more".
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trained": ("What was trained", ()),
    "result": ("How well it does", ("cmc",)),
    "failures": ("Where it fails", ("failures", "camera_pairs", "ranked_worst")),
    "lists": ("Ranked lists", ("ranked_best", "ranked_random")),
    "clusters": ("Clusters", ("clusters",)),
    "training": ("Training", ("training",)),
    "data": ("Data", ("domains", "style_copies")),
    "more": ("More pictures", ()),
    "configuration": ("Configuration", ()),
    "machine": ("Machine", ()),
}
_OPTIONAL = ("lists", "clusters", "data", "more")  # left out where they would be empty


def write_report(
    run_folder: str | Path, *, comparison: Comparison | None = None, output: str | Path | None = None
) -> Path:
    """Write the report of a run, complete or not at all. The training curves are drawn anew from metrics.jsonl.

    Args:
        run_folder: as `train` leaves it, finished or not; the other pictures are those of its figures/.
        comparison: kept as RUN/comparison.json, so that a later report of the run shows it too.
        output: where to write, by default RUN/report.html; with it nothing is written into the run.

    Returns:
        The report's path.

    Raises:
        UserError: for a folder that is no run folder, and for a file in it that cannot be read.
    """
    path = Path(run_folder)
    page = render_report(read_run(path), comparison or read_comparison(path / COMPARISON))
    if output is None and comparison is not None:
        write_atomically(path / COMPARISON, json.dumps(asdict(comparison), indent=1) + "\n")
    return write_atomically(path / REPORT if output is None else output, page)


def render_report(run: RunFolder, comparison: Comparison | None = None) -> str:
    """The report's HTML."""
    findings = read_mapping(run.path / FIGURES / FINDINGS) or {}
    figures = {figure.name: figure for figure in run.figures}
    if run.metrics:
        title, caption = TRAINING
        drawn = png_of(pixels_of(draw_training_curves(run.metrics)), title=title, caption=caption)
        figures["training"] = read_figure("training", drawn)
    pictures = {
        part: [(figure, _uri(figure)) for name in names if (figure := figures.pop(name, None))]
        for part, (_, names) in _PARTS.items()
    }
    pictures["more"] = [(figure, _uri(figure)) for figure in figures.values()]
    clusters = words.clusters(run.metrics)
    empty = [part for part in _OPTIONAL if not pictures[part] and not (part == "clusters" and clusters)]
    config = words.flat(run.config or {})
    return template("report.html.j2", escape=True).render(
        name=run.path.resolve().name,
        css=resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
        version=__version__,
        titles={part: title for part, (title, _) in _PARTS.items() if part not in empty},
        notices=[notice for notice in (words.state(run), words.collapse(run.evaluation)) if notice],
        method=words.method(config),
        trained=words.trained(config),
        headline=words.headline(run.evaluation),
        measures=words.measures(run.evaluation),
        best=words.best(run.summary or {}),
        num_queries=words.count(run.evaluation.get("num_valid_queries")),
        failures=words.failures(run.evaluation, findings),
        clusters=clusters,
        comparison=None if comparison is None else comparison_table(comparison),
        training=words.training(run),
        machine=words.machine(run, config),
        config=[(key, words.shown(value)) for key, value in config.items()],
        pictures=pictures,
    )


def template(name: str, *, escape: bool) -> jinja2.Template:
    """A template of this package."""
    environment = jinja2.Environment(
        autoescape=escape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _uri(figure: FigureFile) -> str:
    """The picture as it is, or as WebP where that is smaller: sheets of photographs shrink to a fifth."""
    kind, data = "png", figure.data
    if features.check("webp"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(buffer, format="WEBP", quality=90)
        if len(buffer.getvalue()) < len(data) / 2:
            kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
