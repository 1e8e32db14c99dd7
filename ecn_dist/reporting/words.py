"""What a report and a model card say of a run, in words and numbers: no markup here. What is missing is left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from ecn_dist.config_gate import flat
from ecn_dist.methods import describe
from ecn_dist.reporting.run_reader import RunFolder, mapping, number, numbers

Lines = list[tuple[str, str]]
Comparison = Mapping[str, Sequence[Mapping[str, Any]]]  # by a row's name its evaluations, one a seed


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def mean_percent(fractions: Sequence[float]) -> str:
    """Mean, and of several the sample standard deviation, as 43.1 ± 0.2."""
    return percent(fmean(fractions)) + (f" ± {percent(stdev(fractions))}" if len(fractions) > 1 else "")


def count(value: Any) -> str:
    """A whole number with its thousands apart; empty for what is none."""
    return f"{value:,}" if isinstance(number(value), int) else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


MEASURES = {  # by key of the summary's evaluation: name, meaning; all are fractions
    "mAP": ("mAP, trapezoid", "area under the precision-recall curve by the trapezoid rule, as papers of 2019 give it"),
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
_whole = "{:,.0f}".format
_Figures = dict[str, tuple[str, Callable[[float], str], str]]  # by key: name, form, meaning
_SUMMARY: _Figures = {
    "steps": ("Steps", _whole, ""),
    "epochs": ("Epochs", _whole, ""),
    "world_size": ("Ranks", _whole, ""),
    "images_per_second": ("Images per second, all ranks", "{:,.1f}".format, ""),
    "wall_seconds": ("Time", duration, ""),
}
_CLUSTERS: _Figures = {  # of the metrics
    "epoch": ("Epoch", "{:.0f}".format, ""),
    "clusters": ("Clusters", _whole, "groups of near pictures; each is taken for one person in that epoch"),
    "cluster_size_mean": ("Mean size", "{:.1f}".format, "pictures a cluster"),
    "cluster_size_max": ("Largest", _whole, "pictures of the largest cluster"),
    "outliers": ("Outliers", _whole, "pictures in no cluster, as too few are near; not trained on in that epoch"),
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
    if run.summary:
        return "This run has ended without an evaluation: no target with query and gallery, or not asked for."
    upto = f"up to step {run.metrics[-1]['step']}" if run.metrics else "so far"
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


def measures(evaluation: Mapping[str, float], keys: Sequence[str] = tuple(MEASURES)) -> list[tuple[str, str, str]]:
    """Name, percent, meaning."""
    return [(MEASURES[key][0], percent(evaluation[key]), MEASURES[key][1]) for key in keys if key in evaluation]


def collapse(evaluation: Mapping[str, float]) -> str:
    """A warning where queries have their whole gallery at one distance; else empty."""
    collapsed, queries = evaluation.get("collapsed_queries"), evaluation.get("num_valid_queries")
    if not collapsed or not queries:
        return ""
    return (
        f"{collapsed:,.0f} of {queries:,.0f} queries have all gallery pictures at one distance: the features have "
        "collapsed, or the pictures are alike. The trapezoid mAP then says nothing; see the step-wise one and the loss."
    )


def best(summary: Mapping[str, Any]) -> str:
    """A sentence on the checkpoint that was best on validation identities; empty where none was chosen."""
    chosen = mapping(summary.get("best"))
    step, area = number(chosen.get("step")), numbers(chosen.get("validation")).get("mAP_stepwise")
    if step is None or area is None:
        return ""
    return (
        f"Among the checkpoints, step-{step:08.0f} had the highest step-wise mAP on validation identities "
        f"({percent(area)} percent), and is kept. Weights and results of the run are those after its last step."
    )


def failures(evaluation: Mapping[str, float], findings: Mapping[str, Any]) -> list[str]:
    """Sentences on where the ranking fails."""
    misses = {"rank1": "of the queries have another person at rank 1", "rank10": "have no true match in the first 10"}
    sentences = [
        f"{percent(1 - evaluation[key])} percent {words}." for key, words in misses.items() if key in evaluation
    ]
    first = numbers(findings.get("first_answers"))
    if first.get("num_wrong") and first.keys() >= {"num_wrong_own_camera", "own_camera_share", "num_queries"}:
        wrong, among, chance = first["num_wrong"], first["num_queries"], first["own_camera_share"]
        own = first["num_wrong_own_camera"] / wrong
        verdict = "So the camera alone does not explain them."
        if wrong < 10:
            verdict = "Too few to say why."
        elif own > 1.5 * chance:
            verdict = "That is much more than chance: the features still tell the cameras apart."
        sentences.append(
            f"Of {wrong:,.0f} wrong first answers (among {among:,.0f} queries looked at), {percent(own)} "
            f"percent are by the query's own camera, which took {percent(chance)} percent of the gallery. {verdict}"
        )
    pairs = findings.get("weakest_camera_pairs")
    named = [
        f"{pair.get('query_camera')} to {pair.get('gallery_camera')} ({percent(value)} percent)"
        for pair in map(mapping, pairs if isinstance(pairs, list) else [])
        if (value := number(pair.get("value"))) is not None
    ]
    return sentences + [f"Lowest mAP by camera of query and gallery: {', '.join(named)}."] * bool(named)


def training(run: RunFolder) -> Lines:
    """How long it trained on what, and its last losses."""
    values = numbers(run.summary)
    lines = [(name, form(values[key])) for key, (name, form, _) in _SUMMARY.items() if key in values]
    last = {key: value for row in run.metrics for key, value in numbers(row).items()}
    losses = sorted(key for key in last if key == "loss" or key.startswith("loss_"))
    return lines + [(f"Last {key.replace('_', ' ')}", f"{last[key]:.4g}") for key in losses]


def clusters(rows: Sequence[Mapping[str, Any]], most: int = 8) -> tuple[Lines, list[list[str]]]:
    """A table of a run's clusters: heads with meanings; and a line for each epoch, of many at most `most`, evenly."""
    found = [row for row in map(numbers, rows) if "clusters" in row]
    figures = {key: figure for key, figure in _CLUSTERS.items() if any(key in row for row in found)}
    places = sorted({round(at * (len(found) - 1) / (most - 1)) for at in range(most)}) if found else []
    lines = [
        [form(found[at][key]) if key in found[at] else "" for key, (_, form, _) in figures.items()] for at in places
    ]
    return [(name, meaning) for name, _, meaning in figures.values()], lines


def compared(rows: Comparison) -> tuple[list[str], list[list[str]]]:
    """A table of several runs: heads, and for each row means in percent, the best in bold, with the sample standard
    deviation where there are several seeds."""
    runs = {name: list(map(numbers, of_row)) for name, of_row in rows.items()}
    keys = [key for key in MEASURES if any(key in run for of_row in runs.values() for run in of_row)]
    seeds = ["seeds"] * any(len(of_row) > 1 for of_row in runs.values())
    lines = {name: [name] for name in runs}
    for key in keys:
        values = {name: found for name in runs if (found := [run[key] for run in runs[name] if key in run])}
        highest = max(map(fmean, values.values()))
        for name, line in lines.items():
            found = values.get(name, [])
            mean, sign, spread = mean_percent(found).partition(" ") if found else ("", "", "")
            is_best = len(runs) > 1 and found and fmean(found) == highest
            line.append(Markup("<b>{}</b>{}{}" if is_best else "{}{}{}").format(mean, sign, spread))
    heads = ["Row", *(MEASURES[key][0] for key in keys), *seeds]
    return heads, [[*line, *(str(len(runs[name])) for _ in seeds)] for name, line in lines.items()]


def machine(run: RunFolder, config: Mapping[str, Any]) -> Lines:
    """What the run wrote about its machine, with the options that speak of it."""
    lines = [*flat(mapping(run.summary.get("machine"))).items()]
    lines += [(key, config[key]) for key in ("device", "precision", "engine") if key in config]
    return [(key.replace("_", " "), shown(value)) for key, value in lines if shown(value)]


_COMMAND = re.compile(r"pipe:.*", re.DOTALL)
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?:[^/\s]*@)?(?P<rest>[^\s?#]*)(?:[?#]\S*)?")


def shown(value: Any) -> str:
    """`value` as words, as reports are passed on: what may hold a key is left out, which is of a URL user, password and
    query, and of a source `pipe:COMMAND` the command."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return _CREDENTIALS.sub(r"\g<scheme>\g<rest>", _COMMAND.sub("pipe:(a command, not shown)", str(value)))
