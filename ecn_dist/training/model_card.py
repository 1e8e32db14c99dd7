"""MODEL_CARD.md: what a model was trained on, how well it does, and what it is and is not for.

Mitchell et al., "Model Cards for Model Reporting" (2019). A card is passed on with the weights: it names data by
layout, counts and fingerprint, never by where they lay, and says plainly what is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ecn_dist.config import Config, flatten
from ecn_dist.data import ShardIndex
from ecn_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone
from ecn_dist.models.fingerprint import fingerprint_backbone
from ecn_dist.reporting import words
from ecn_dist.training.run_folder import CARD, CONFIG, SUMMARY, WEIGHTS, fingerprint, read_summary

NAME = CARD
UNKNOWN = "unknown"
_PLACES = ("Source, labelled", "Target, unlabelled", "Network")  # of the report's words; the card has its own
_RECIPE_SECTIONS = ("model.", "memory.", "loss.", "optim.")
_RECIPE_KEYS = (
    "seed",
    "epochs",
    "global_batch_size",
    "precision",
    "engine",
    "data.camera_style",
    "data.random_erasing",
)
_MODEL_LINE = "Model fingerprint (SHA-256): "


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its configuration."""

    summary: Mapping[str, Any] | None
    """summary.json of its run, if these weights are those that it speaks of"""
    why_unknown: str = ""
    """a sentence, where there is no summary"""


def describe_data(index: ShardIndex) -> dict[str, Any]:
    """What a card tells of a shard folder; `train` keeps it in summary.json under data.source and data.target."""
    splits = {
        name: {key: split.get(key) for key in ("samples", "num_identities", "distractors")}
        for name, split in index.about["splits"].items()
    }
    return {
        "layout": index.layout,
        "num_cameras": index.num_cameras,
        "camera_style": index.about.get("camera_style"),
        "splits": splits,
        "fingerprint": fingerprint(index),
    }


def facts_of(path: Path, config_file: Path | None = None) -> Facts:
    """The facts on what `load_trained(path, ..., config_file)` loads.

    A run's summary speaks of its exported weights alone: not of a checkpoint, and not of weights found elsewhere.
    """
    folder = path if path.is_dir() else path.parent
    weights = folder / WEIGHTS
    if config_file is not None and config_file.absolute() != (folder / CONFIG).absolute():
        return Facts(None, "The weights were given apart from their run folder, so its results are not known.")
    if path.is_file() and path != weights:
        return Facts(
            None, f"The weights come from another file than a run's {WEIGHTS}, and no evaluation of it is known."
        )
    if not (folder / CONFIG).is_file() or not weights.is_file() or path not in (folder, weights):
        return Facts(None, "The weights are those of a checkpoint within a run, which was not evaluated by itself.")
    summary = read_summary(folder)
    return Facts(summary, "" if summary is not None else f"The run folder has no {SUMMARY}.")


def has_card(path: Path, model: str) -> bool:
    """Whether `path` is a card of this very model (by its fingerprint), which its owner may have completed.

    Raises `UserError` where it is another model's, which is not to be lost.
    """
    if not path.is_file():
        return False
    if model not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path} is the card of another model; export to a folder of its own, or remove that card")
    return True


def write_card(path: Path, backbone: Backbone, config: Config, facts: Facts) -> None:
    """Write the card of `backbone`, complete or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(card_of(backbone, config, facts), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def card_of(backbone: Backbone, config: Config, facts: Facts) -> str:
    """The card as Markdown."""
    options = flatten(config)
    options["model.weights"] = _without_place(config.model.weights)
    summary = facts.summary or {}
    sections = {
        "Model": _model(backbone, config),
        "Intended use": _INTENDED,
        "Not intended, and misuse": _MISUSE,
        "Data": _data(summary, options),
        "Recipe": _recipe(options, summary),
        "Results": _results(summary, facts.why_unknown),
        "Limits": _LIMITS,
        "What is not known": _UNKNOWNS,
    }
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
    return f"# Model card: person re-identification, {config.model.arch}\n\n{body}\n"


def _model(backbone: Backbone, config: Config) -> str:
    height, width = config.data.height, config.data.width
    mean, std = (", ".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return f"""\
A network that turns a picture of one person, cut out by a detector or by hand, into a feature. Features of the same
person, seen by other cameras, are meant to be near to each other. Trained with ecn_dist by the method of Zhong, Zheng,
Luo, Li and Yang, "Invariance Matters: Exemplar Memory for Domain Adaptive Person Re-identification" (CVPR 2019).

- Network: {config.model.arch}, cut before its classifier; started from weights: {_without_place(config.model.weights)}
- Input: RGB, the whole picture resized to {height} x {width} pixels (height x width; bicubic with antialiasing), values
  divided by 255, then minus the mean ({mean}), divided by the standard deviation ({std})
- Output: {backbone.num_features} numbers of unit length; compare by Euclidean distance or dot product
- {_MODEL_LINE}`{fingerprint_backbone(backbone, height, width)}`; features of models with other fingerprints
  are not comparable"""


_INTENDED = """\
Research on person re-identification and domain adaptation, and retrieval in collections of pictures that one may
lawfully use for it: ranking pictures for a person who looks at them and decides."""

_MISUSE = """\
- Features of people are biometric data. Their use is restricted by law in many places (in the European Union by the
  GDPR, Article 9, and the AI Act), and needs a legal basis and, as a rule, the consent of those in the pictures.
- Not for identifying or tracking people without their knowledge, not for mass surveillance, and not for decisions about
  people without a human who can and does overrule them. A near feature is no evidence of identity.
- Not for inferring traits such as origin, health, age or sex.
- Pictures and features can be linked to people: keep them no longer than needed, and protect them as the pictures."""

_LIMITS = """\
- The results hold for the cameras, people and time of the evaluation data. Other cameras, resolutions, seasons or
  detectors can change them much; evaluate on data of your own before relying on anything.
- What is compared is mostly clothing and carried things: a person who changes clothes is often not found, and two
  people dressed alike are confused.
- A distance has no fixed meaning across domains: choose a threshold, if any, on labelled data of the place of use.
- The nearest picture is always some picture, also where the person is not in the gallery at all."""

_UNKNOWNS = """\
- Performance by group (such as skin colour, age, sex, disability): not measured, as the data carry no such labels.
- Whether the people in the data consented, and under which terms the data may be used: the shards do not say. Those who
  pass the model on must say it here.
- The licence of these weights: not stated by the program that wrote this card."""


def _data(summary: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    described = summary.get("data")
    data = described if isinstance(described, Mapping) else {}
    parts = [
        _domain("Source, with identities", data.get("source")),
        _domain("Target, whose identities no loss has seen", data.get("target")),
    ]
    if options["model.weights"] != "none":
        parts.append(
            "The weights that training started from were trained on data of their own, which are not listed here."
        )
    return "\n\n".join(parts)


def _domain(title: str, data: object) -> str:
    if not isinstance(data, Mapping):
        return f"**{title}**: {UNKNOWN}; the run did not record it."
    lines = [
        f"**{title}**: {words.count(data.get('num_cameras')) or UNKNOWN} cameras; in the folder layout "
        f"`{data.get('layout', UNKNOWN)}`, which names a form and not necessarily the data set of that name.",
        "",
        "| split | identities | pictures | of them distractors |",
        "|---|---:|---:|---:|",
    ]
    splits = data.get("splits")
    for name, split in (splits if isinstance(splits, Mapping) else {}).items():
        cells = (words.count(split.get(key)) or UNKNOWN for key in ("num_identities", "samples", "distractors"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Fingerprint of the shards: `{data.get('fingerprint', UNKNOWN)}`."]
    if data.get("camera_style") not in (None, "none"):
        lines.append(f"Style copies between its cameras: {data['camera_style']}.")
    return "\n".join(lines)


def _recipe(options: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    lines = [words.method(options), ""]
    lines += [f"- {name}: {value}" for name, value in words.trained(options) if name not in _PLACES]
    for key, name in (("steps", "Steps"), ("world_size", "Ranks"), ("skipped_steps", "Skipped steps")):
        lines.append(f"- {name}: {words.count(summary.get(key)) or UNKNOWN}")
    kept = {key: value for key, value in options.items() if key in _RECIPE_KEYS or key.startswith(_RECIPE_SECTIONS)}
    return "\n".join([*lines, "", "```yaml", *(f"{key}: {value}" for key, value in kept.items()), "```"])


def _results(summary: Mapping[str, Any], why_unknown: str) -> str:
    evaluation = summary.get("evaluation")
    if not isinstance(evaluation, Mapping):
        reason = why_unknown or "The target had no query and gallery to evaluate on."
        return f"{UNKNOWN.capitalize()}. {reason}"
    lines = [
        "Of the target's query and gallery, on which nothing was trained; in percent. Gallery pictures of the query's "
        "person by the query's own camera are left out. Published tables differ in which mAP they give: compare like "
        "with like.",
        "",
        "| measure | percent | meaning |",
        "|---|---:|---|",
    ]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in words.measures(evaluation)]
    queries = words.count(evaluation.get("num_valid_queries")) or UNKNOWN
    return "\n".join(
        [*lines, "", f"Queries with a true match: {queries}. One run, one seed; the spread over seeds is not given."]
    )


def _without_place(weights: str) -> str:
    """Where the initial weights came from, without the folders of somebody's disk or the keys of a URL."""
    if weights in ("imagenet", "none"):
        return weights
    if weights.startswith(("http://", "https://")):
        return words.shown(weights)
    return f"file {PurePosixPath(weights).name}"
