"""MODEL_CARD.md: what a model was trained on, how well it does, and what it is and is not for.

Mitchell et al., "Model Cards for Model Reporting" (2019); the text is model_card.md.j2. A card is passed on with the
weights: it names data by layout, counts and fingerprint, never by where they lay, and says plainly what is not known.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ecn_dist import methods
from ecn_dist.data import ShardIndex
from ecn_dist.files import write_atomically
from ecn_dist.models import Backbone, fingerprint_backbone
from ecn_dist.reporting import words
from ecn_dist.reporting.report import template
from ecn_dist.reporting.run_reader import CARD, CONFIG, SUMMARY, WEIGHTS, mapping, numbers, read_mapping

NAME = CARD
_ELSEWHERE = ("Source, labelled", "Target, unlabelled", "Network")  # of the report's words; the card has its own
# What says where something is or how it was run, and nothing about the model.
_NO_RECIPE = ("source", "target", "output_dir", "resume", "resume_changed", "device", "timeout_seconds")
_NO_RECIPE_SECTIONS = ("data.", "checkpoint.", "evaluation.", "logging.")
_RECIPE_OF_DATA = ("data.camera_style", "data.random_erasing")


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its configuration: summary.json of its run, if it speaks of these weights, and a
    sentence for where there is no result."""

    summary: Mapping[str, Any] | None
    why_unknown: str = "There was no target with query and gallery to evaluate on."


def fingerprint(index: ShardIndex) -> str:
    """What a shard folder holds, wherever it lies: its index has the checksums of all its files."""
    return hashlib.sha256(json.dumps(index.about, sort_keys=True).encode()).hexdigest()


def describe_data(index: ShardIndex) -> dict[str, Any]:
    """What a card tells of a shard folder; `train` keeps it in summary.json under data.source and data.target."""
    told = ("samples", "num_identities", "distractors")
    return {
        "layout": index.layout,
        "num_cameras": index.num_cameras,
        "camera_style": index.about.get("camera_style"),
        "splits": {name: {key: of.get(key) for key in told} for name, of in index.about["splits"].items()},
        "fingerprint": fingerprint(index),
    }


def facts_of(path: Path, config_file: Path | None = None) -> Facts:
    """The facts on what `load_trained(path, ..., config_file)` loads.

    A run's summary speaks of its exported weights alone: not of a checkpoint, and not of weights found elsewhere.
    """
    folder = path if path.is_dir() else path.parent
    config, weights = folder / CONFIG, folder / WEIGHTS
    if config_file is not None and config_file.absolute() != config.absolute():
        why = "The weights were given apart from their run folder, so its results are not known."
    elif path.is_file() and path != weights:
        why = f"The weights come from another file than a run's {WEIGHTS}, and no evaluation of it is known."
    elif not config.is_file() or not weights.is_file() or path not in (folder, weights):
        why = "The weights are those of a checkpoint within a run, which was not evaluated by itself."
    elif (summary := read_mapping(folder / SUMMARY)) is None:
        why = f"The run folder has no {SUMMARY}."
    else:
        return Facts(summary)
    return Facts(None, why)


def write_card(path: Path, backbone: Backbone, options: Mapping[str, Any], facts: Facts) -> None:
    """Write the card of `backbone`, complete or not at all. The arguments are those of `card_of`."""
    write_atomically(path, card_of(backbone, options, facts))


def card_of(backbone: Backbone, options: Mapping[str, Any], facts: Facts) -> str:
    """The card of a network as Markdown: `options` are its run's, flat, as {"model.arch": ...}."""
    weights, summary = words.shown(options["model.weights"]), facts.summary or {}
    if not re.match(r"(imagenet|none)$|https?://|pipe:", weights):
        weights = f"file {PurePosixPath(weights).name}"  # without the folders of somebody's disk
    options = dict(options) | {"model.weights": weights}
    text = template("model_card.md.j2", escape=False).render(
        words=words,
        options=options,
        summary=summary,
        evaluation=numbers(summary.get("evaluation")),
        data=mapping(summary.get("data")),
        mean=", ".join(map(str, backbone.mean)),
        std=", ".join(map(str, backbone.std)),
        num_features=backbone.num_features,
        fingerprint=fingerprint_backbone(backbone, options["data.height"], options["data.width"]),
        recipe=[line for line in words.trained(options) if line[0] not in _ELSEWHERE],
        kept=[
            (key, value)
            for key, value in options.items()
            if (key in _RECIPE_OF_DATA or not (key in _NO_RECIPE or key.startswith(_NO_RECIPE_SECTIONS)))
            and not methods.unread(options.get("method", "ecn"), key)
        ],
        why_unknown=facts.why_unknown,
        plain=_plain,
        unknown="unknown",
    )
    return text.rstrip() + "\n"


def _plain(value: Any) -> str:
    """A name from data, without what is markup to Markdown or HTML."""
    return str(value).translate({ord("`"): "'", ord("|"): "\\|", ord("<"): "&lt;", ord("["): "\\["})
