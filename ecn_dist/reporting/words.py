"""What a report says of a run, as plain words and numbers: no HTML here.

Every function takes what the run left behind and returns strings; what is missing is left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ecn_dist import methods
from ecn_dist.reporting.run_reader import RunFolder

MEASURES = {
    "mAP": ("mAP, trapezoid", "area under the precision-recall curve by the trapezoid rule; the paper's figure"),
    "mAP_stepwise": ("mAP, step-wise", "mean of the average precision that most other toolboxes report"),
    "rank1": ("rank-1", "queries whose nearest gallery picture is the right person"),
    "rank5": ("rank-5", "queries with a true match among the first 5"),
    "rank10": ("rank-10", "queries with a true match among the first 10"),
    "mINP": ("mINP", "how early the last true match of a query comes (inverse negative penalty)"),
    "tpr_at_fpr_0.001": ("TPR at FPR 1e-3", "pairs of one person accepted where 1 of 1,000 pairs of two people is"),
    "tpr_at_fpr_0.0001": ("TPR at FPR 1e-4", "the same where 1 of 10,000 pairs of two people is accepted"),
}


def state(run: RunFolder) -> str:
    """A sentence for a run that has no result, empty for one that has."""
    if run.evaluation:
        return ""
    if run.summary is not None:
        return (
            "This run has ended, and has no evaluation: its target has no query and gallery, or it was not asked for."
        )
    last = run.metrics[-1].get("step") if run.metrics else None
    upto = f"what it wrote up to step {last}" if last is not None else "what it wrote so far"
    return f"This run has not ended, or was stopped before its end: there is no summary.json. Shown is {upto}."


def method(config: Mapping[str, Any]) -> str:
    """The method in words."""
    return methods.describe(config)


def trained(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few options that say what was trained."""

    def of(key: str, words: str = "{}") -> str:
        return words.format(shown(config[key])) if config.get(key) is not None else ""

    epochs = of("epochs")
    if config.get("optim.source_only_epochs"):
        epochs = f"{of('optim.source_only_epochs')} on the source alone, then {epochs}"
    lines = {
        "Source, labelled": of("source"),
        "Target, unlabelled": of("target"),
        "Network": ", ".join(filter(None, (of("model.arch"), of("model.weights", "weights: {}")))),
        "Embedding": of("model.embedding_dim", "{} numbers"),
        "Input": f"{of('data.height')} x {of('data.width')} pixels" if of("data.height") else "",
        "Epochs": epochs,
        "Global batch": of("global_batch_size", "{} pictures of each domain"),
        "Precision": of("precision"),
        "Seed": of("seed"),
    }
    return [(name, value) for name, value in lines.items() if value]


def headline(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    wanted = ("rank1", "mAP", "mAP_stepwise", "mINP")
    return [(MEASURES[key][0], percent(evaluation[key])) for key in wanted if is_number(evaluation.get(key))]


def measures(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, percent, meaning."""
    return [
        (name, percent(evaluation[key]), meaning)
        for key, (name, meaning) in MEASURES.items()
        if is_number(evaluation.get(key))
    ]


def failures(evaluation: Mapping[str, Any], findings: Mapping[str, Any]) -> list[str]:
    """Sentences on where the ranking fails."""
    sentences = []
    if is_number(evaluation.get("rank1")):
        sentences.append(f"{percent(1.0 - evaluation['rank1'])} percent of the queries have another person at rank 1.")
    if is_number(evaluation.get("rank10")):
        sentences.append(f"{percent(1.0 - evaluation['rank10'])} percent have no true match among the first 10.")
    answers = findings.get("first_answers") or {}
    if answers.get("num_wrong") and answers.get("num_wrong_own_camera") is not None:
        share, chance = answers["num_wrong_own_camera"] / answers["num_wrong"], answers["own_camera_share"]
        by_camera = (
            "Too few to say why."
            if answers["num_wrong"] < 10
            else "Much more than chance: pictures are still told apart by camera."
            if share > 1.5 * chance
            else "So the camera alone does not explain them."
        )
        sentences.append(
            f"Of {answers['num_wrong']:,} wrong first answers (among {answers['num_queries']:,} queries looked at), "
            f"{percent(share)} percent come from the query's own camera, which took {percent(chance)} percent of the "
            f"gallery. {by_camera}"
        )
    pairs = findings.get("weakest_camera_pairs") or {}
    if pairs.get("pairs"):
        named = [
            f"{pair['query_camera']} against {pair['gallery_camera']} ({percent(pair['value'])})"
            for pair in pairs["pairs"]
        ]
        sentences.append(
            f"Weakest camera pairs by {pairs['measure']} (percent), query against gallery: {', '.join(named)}."
        )
    return sentences


def training(run: RunFolder) -> list[tuple[str, str]]:
    summary, lines = run.summary or {}, []
    for key, name, form in (
        ("steps", "Steps", "{:,}"),
        ("epochs", "Epochs", "{:,}"),
        ("world_size", "Ranks", "{:,}"),
        ("images_per_second", "Images per second, all ranks", "{:,.1f}"),
    ):
        if is_number(summary.get(key)):
            lines.append((name, form.format(summary[key])))
    if is_number(summary.get("wall_seconds")):
        lines.append(("Time", duration(summary["wall_seconds"])))
    for key, name in (("loss", "Last loss"), ("loss_source", "Last source loss"), ("loss_target", "Last target loss")):
        logged = [row[key] for row in run.metrics if is_number(row.get(key))]
        if logged:
            lines.append((name, f"{logged[-1]:.4g}"))
    return lines


def machine(run: RunFolder, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run wrote about its machine, with the options that speak of it."""
    recorded = (run.summary or {}).get("machine")
    lines = [(key, shown(value)) for key, value in flat(recorded).items()] if isinstance(recorded, Mapping) else []
    lines += [(key, shown(config[key])) for key in ("device", "precision", "engine") if key in config]
    return [(key.replace("_", " "), value) for key, value in lines if value]


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"memory.momentum": 0.01, ...}"""

    def entries() -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.").items()
            else:
                yield f"{prefix}{key}", value

    return dict(entries())


_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?:[^/\s]*@)?(?P<rest>[^\s?#]*)(?:[?#]\S*)?")


def shown(value: Any) -> str:
    """`value` as words; of a URL neither user, password nor query, which may hold a key, as reports are passed on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return _CREDENTIALS.sub(r"\g<scheme>\g<rest>", str(value))


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def count(value: Any) -> str:
    """A whole number with its thousands apart; empty for what is none."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
