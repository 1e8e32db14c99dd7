"""What a report says of a run, in plain words and numbers: no HTML here. What is missing is left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ecn_dist.methods import describe
from ecn_dist.reporting.run_reader import RunFolder, number

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
Lines = list[tuple[str, str]]


def state(run: RunFolder) -> str:
    """A sentence for a run that has no result, empty for one that has."""
    if run.evaluation:
        return ""
    if run.summary is not None:
        return "This run has ended without an evaluation: no target with query and gallery, or not asked for."
    last = run.metrics[-1].get("step") if run.metrics else None
    upto = f"what it wrote up to step {last}" if last is not None else "what it wrote so far"
    return f"This run has not ended, or was stopped before its end: there is no summary.json. Shown is {upto}."


def method(config: Mapping[str, Any]) -> str:
    """The method in its own words, from flat options; nothing where these are none that it knows."""
    try:
        return describe(config) if config else ""
    except (TypeError, ValueError):
        return ""


def trained(config: Mapping[str, Any]) -> Lines:
    """The few options that say what was trained."""

    def of(key: str, words: str = "{}") -> str:
        return words.format(shown(config[key])) if config.get(key) is not None else ""

    first = f"{of('optim.source_only_epochs')} on the source alone, then "
    lines = {
        "Source, labelled": of("source"),
        "Target, unlabelled": of("target"),
        "Network": ", ".join(filter(None, (of("model.arch"), of("model.weights", "weights: {}")))),
        "Embedding": of("model.embedding_dim", "{} numbers"),
        "Input": of("data.height") and f"{of('data.height')} x {of('data.width')} pixels",
        "Epochs": (first if config.get("optim.source_only_epochs") else "") + of("epochs"),
        "Global batch": of("global_batch_size", "{} pictures of each domain"),
        "Precision": of("precision"),
        "Seed": of("seed"),
    }
    return [(name, value) for name, value in lines.items() if value]


def headline(evaluation: Mapping[str, Any]) -> Lines:
    """The four measures on top of a report: name, percent."""
    found = {name: value for name, value, _ in measures(evaluation)}
    return [(name, found[name]) for name in ("rank-1", "mAP, trapezoid", "mAP, step-wise", "mINP") if name in found]


def measures(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, percent, meaning."""
    values = {key: number(evaluation.get(key)) for key in MEASURES}
    return [(MEASURES[key][0], percent(value), MEASURES[key][1]) for key, value in values.items() if value is not None]


def collapse(evaluation: Mapping[str, Any]) -> str:
    """A warning where queries have their whole gallery at one distance; else empty."""
    collapsed, queries = number(evaluation.get("collapsed_queries")), number(evaluation.get("num_valid_queries"))
    if not collapsed or not queries:
        return ""
    return (
        f"{collapsed:,.0f} of {queries:,.0f} queries have all gallery pictures at one distance: the features have "
        "collapsed, or the pictures are all alike. The trapezoid mAP then says nothing (it is above 50 percent); look "
        "at the step-wise one, at the loss and at the pictures."
    )


def best(summary: Mapping[str, Any]) -> str:
    """A sentence on the checkpoint that was best on validation identities; empty where none was chosen."""
    found = chosen if isinstance(chosen := summary.get("best"), Mapping) else {}
    figures = measured if isinstance(measured := found.get("validation"), Mapping) else {}
    if (step := number(found.get("step"))) is None or (area := number(figures.get("mAP_stepwise"))) is None:
        return ""
    return (
        f"Among the checkpoints, step-{step:08.0f} had the highest step-wise mAP on validation identities "
        f"({percent(area)} percent), and is kept. Weights and results of the run are those after its last step."
    )


def failures(evaluation: Mapping[str, Any], findings: Mapping[str, Any]) -> list[str]:
    """Sentences on where the ranking fails."""
    misses = {"rank1": "of the queries have another person at rank 1", "rank10": "have no true match in the first 10"}
    shares = [(number(evaluation.get(key)), words) for key, words in misses.items()]
    sentences = [f"{percent(1 - share)} percent {words}." for share, words in shares if share is not None]
    answers, pairs = findings.get("first_answers"), findings.get("weakest_camera_pairs")
    wrong, own, chance, among = (
        number(answers.get(key)) if isinstance(answers, Mapping) else None
        for key in ("num_wrong", "num_wrong_own_camera", "own_camera_share", "num_queries")
    )
    if wrong and own is not None and chance is not None and among is not None:
        by_camera = "So the camera alone does not explain them."
        if own / wrong > 1.5 * chance:
            by_camera = "Much more than chance: pictures are still told apart by camera."
        sentences.append(
            f"Of {wrong:,.0f} wrong first answers (among {among:,.0f} queries looked at), {percent(own / wrong)} "
            f"percent come from the query's own camera, which took {percent(chance)} percent of the gallery. "
            + ("Too few to say why." if wrong < 10 else by_camera)
        )
    named = [
        f"{pair.get('query_camera')} against {pair.get('gallery_camera')} ({percent(value)})"
        for pair in (pairs if isinstance(pairs, list) else [])
        if isinstance(pair, Mapping) and (value := number(pair.get("value"))) is not None
    ]
    if named:
        sentences.append(f"Weakest camera pairs by mAP (percent), query against gallery: {', '.join(named)}.")
    return sentences


_SUMMARY: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("Steps", "{:,.0f}".format),
    "epochs": ("Epochs", "{:,.0f}".format),
    "world_size": ("Ranks", "{:,.0f}".format),
    "images_per_second": ("Images per second, all ranks", "{:,.1f}".format),
    "wall_seconds": ("Time", lambda seconds: duration(seconds)),
}


def training(run: RunFolder) -> Lines:
    """How long it trained on what, and its last losses."""
    values = {key: number((run.summary or {}).get(key)) for key in _SUMMARY}
    lines = [(_SUMMARY[key][0], _SUMMARY[key][1](value)) for key, value in values.items() if value is not None]
    last = {key: found for row in run.metrics for key, value in row.items() if (found := number(value)) is not None}
    losses = sorted(key for key in last if key == "loss" or key.startswith("loss_"))
    return lines + [(f"Last {key.replace('_', ' ')}", f"{last[key]:.4g}") for key in losses]


def clusters(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on a run's clusters, from its metrics; none where it made none."""
    found = [row for row in rows if number(row.get("clusters")) is not None]

    def at(row: Mapping[str, Any]) -> str:
        epoch, outliers, size = (number(row.get(key)) for key in ("epoch", "outliers", "cluster_size_mean"))
        sentence = f"epoch {epoch:.0f}, " if epoch is not None else ""
        sentence += f"{row['clusters']:,.0f} clusters" + (f" of {size:.1f} pictures on average" if size else "")
        return sentence + (f", and {outliers:,.0f} outliers" if outliers is not None else "")

    ends = {"At first": found[:1], "At last": found[1:][-1:]}
    sentences = [f"{when}: {at(row)}." for when, rows in ends.items() for row in rows]
    amis = [value for row in found if (value := number(row.get("cluster_ami"))) is not None]
    if amis:
        sentences.append(
            f"Agreement with the people (adjusted mutual information; 1: the same, 0: chance): {amis[0]:.3f} at first, "
            f"{amis[-1]:.3f} at last, at best {max(amis):.3f}. Training sees nothing of it."
        )
    return sentences


def machine(run: RunFolder, config: Mapping[str, Any]) -> Lines:
    """What the run wrote about its machine, with the options that speak of it."""
    recorded = (run.summary or {}).get("machine")
    lines = [*flat(recorded).items()] if isinstance(recorded, Mapping) else []
    lines += [(key, config[key]) for key in ("device", "precision", "engine") if key in config]
    return [(key.replace("_", " "), shown(value)) for key, value in lines if shown(value)]


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"memory.momentum": 0.01, ...}"""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


_COMMAND = re.compile(r"pipe:.*", re.DOTALL)
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?:[^/\s]*@)?(?P<rest>[^\s?#]*)(?:[?#]\S*)?")


def shown(value: Any) -> str:
    """`value` as words, as reports are passed on: what may hold a key is left out, which is of a URL user, password and
    query, and of a source `pipe:COMMAND` the command."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return _CREDENTIALS.sub(r"\g<scheme>\g<rest>", _COMMAND.sub("pipe:(a command, not shown)", str(value)))


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def count(value: Any) -> str:
    """A whole number with its thousands apart; empty for what is none."""
    return f"{value:,}" if isinstance(value, int) and number(value) is not None else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
