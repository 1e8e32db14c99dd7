"""What a report and a model card say of a run, in words and numbers: no markup here. What is missing is left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ecn_dist.methods import describe
from ecn_dist.reporting.run_reader import RunFolder, number

Lines = list[tuple[str, str]]


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


MEASURES = {  # by key of the summary's evaluation: name, meaning; all are fractions
    "mAP": (
        "mAP, trapezoid",
        "area under the precision-recall curve by the trapezoid rule, as re-ID papers of 2019 give it",
    ),
    "mAP_stepwise": ("mAP, step-wise", "mean average precision as most toolboxes compute it"),
    "rank1": ("rank-1", "queries whose nearest gallery picture shows the right person"),
    "rank5": ("rank-5", "queries with a true match among the nearest 5"),
    "rank10": ("rank-10", "queries with a true match among the nearest 10"),
    "mINP": ("mINP", "number of true matches over the rank of the last one: how soon all of them are found"),
    "tpr_at_fpr_0.001": ("TPR at FPR 1e-3", "pairs of one person accepted where 1 of 1,000 pairs of two people is"),
    "tpr_at_fpr_0.0001": ("TPR at FPR 1e-4", "the same where 1 of 10,000 pairs of two people is accepted"),
}
_TRAINED = {  # from the options by dotted key
    "Source, labelled": "{0[source]}",
    "Target, unlabelled": "{0[target]}",
    "Network": "{0[model.arch]}, weights: {0[model.weights]}",
    "Embedding": "{0[model.embedding_dim]} numbers",
    "Input": "{0[data.height]} x {0[data.width]} pixels (height x width)",
    "Epochs on the source alone, first": "{0[optim.source_only_epochs]}",
    "Epochs": "{0[epochs]}",
    "Global batch": "{0[global_batch_size]} pictures of each domain",
    "Precision": "{0[precision]}",
    "Seed": "{0[seed]}",
}
_SUMMARY: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("Steps", "{:,.0f}".format),
    "epochs": ("Epochs", "{:,.0f}".format),
    "world_size": ("Ranks", "{:,.0f}".format),
    "images_per_second": ("Images per second, all ranks", "{:,.1f}".format),
    "wall_seconds": ("Time", duration),
}
_CLUSTERS: dict[str, tuple[str, Callable[[float], str], str]] = {  # by key of the metrics: head, form, meaning
    "epoch": ("Epoch", "{:.0f}".format, ""),
    "clusters": ("Clusters", "{:,.0f}".format, "groups of near pictures; each is taken for one person in that epoch"),
    "cluster_size_mean": ("Mean size", "{:.1f}".format, "pictures a cluster"),
    "cluster_size_max": ("Largest", "{:,.0f}".format, "pictures of the largest cluster"),
    "outliers": (
        "Outliers",
        "{:,.0f}".format,
        "pictures with too few near neighbours to be in a cluster; they are not trained on in that epoch",
    ),
    "cluster_cross_camera": (
        "Two cameras, percent",
        percent,
        "of the pairs of pictures in one cluster, those by two cameras; near 0 the clusters follow the cameras",
    ),
    "cluster_ami": (
        "AMI",
        "{:.3f}".format,
        "adjusted mutual information of clusters and true identities, outliers left out: 1 if they are the same, 0 if "
        "they agree no more than by chance. Known only where the shards have identities; training does not see it",
    ),
}


def state(run: RunFolder) -> str:
    """A sentence for a run that has no result, empty for one that has."""
    if run.evaluation:
        return ""
    if run.summary is not None:
        return "This run has ended without an evaluation: no target with query and gallery, or not asked for."
    last = run.metrics[-1].get("step") if run.metrics else None
    upto = f"up to step {last}" if last is not None else "so far"
    return f"This run has not ended, or was stopped: it has no summary.json. The report shows what it wrote {upto}."


def method(config: Mapping[str, Any]) -> str:
    """The method in its own words, from flat options; nothing where these are none that it knows."""
    with suppress(TypeError, ValueError):
        return describe(config) if config else ""
    return ""


def trained(config: Mapping[str, Any]) -> Lines:
    """The few options that say what was trained."""
    unused = () if config.get("optim.source_only_epochs") else ("optim.source_only_epochs",)
    values = {key: shown(value) for key, value in config.items() if value is not None and key not in unused}
    lines = []
    for name, text in _TRAINED.items():
        with suppress(KeyError):
            lines.append((name, text.format(values)))
    return lines


def measures(evaluation: Mapping[str, Any], keys: Sequence[str] = tuple(MEASURES)) -> list[tuple[str, str, str]]:
    """Name, percent, meaning."""
    values = {key: number(evaluation.get(key)) for key in keys}
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
            by_camera = "That is much more than chance: the features still tell the cameras apart."
        sentences.append(
            f"Of {wrong:,.0f} wrong first answers (among {among:,.0f} queries looked at), {percent(own / wrong)} "
            f"percent are by the query's own camera, which took {percent(chance)} percent of the gallery. "
            + ("Too few to say why." if wrong < 10 else by_camera)
        )
    named = [
        f"{pair.get('query_camera')} to {pair.get('gallery_camera')} ({percent(value)} percent)"
        for pair in (pairs if isinstance(pairs, list) else [])
        if isinstance(pair, Mapping) and (value := number(pair.get("value"))) is not None
    ]
    return sentences + [f"Lowest mAP by camera of query and gallery: {', '.join(named)}."] * bool(named)


def training(run: RunFolder) -> Lines:
    """How long it trained on what, and its last losses."""
    values = {key: number((run.summary or {}).get(key)) for key in _SUMMARY}
    lines = [(_SUMMARY[key][0], _SUMMARY[key][1](value)) for key, value in values.items() if value is not None]
    last = {key: found for row in run.metrics for key, value in row.items() if (found := number(value)) is not None}
    losses = sorted(key for key in last if key == "loss" or key.startswith("loss_"))
    return lines + [(f"Last {key.replace('_', ' ')}", f"{last[key]:.4g}") for key in losses]


def clusters(rows: Sequence[Mapping[str, Any]], most: int = 8) -> tuple[Lines, list[list[str]]]:
    """A table of a run's clusters: heads with meanings; and a line for each epoch, of many at most `most`, evenly."""
    found = [row for row in rows if number(row.get("clusters")) is not None]
    keys = [key for key in _CLUSTERS if any(number(row.get(key)) is not None for row in found)]
    places = {round(at * (len(found) - 1) / (most - 1)) for at in range(most)} if found else set()
    values = [[number(found[place].get(key)) for key in keys] for place in sorted(places)]
    lines = [["" if v is None else _CLUSTERS[key][1](v) for key, v in zip(keys, line, strict=True)] for line in values]
    return [(_CLUSTERS[key][0], _CLUSTERS[key][2]) for key in keys], lines


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
