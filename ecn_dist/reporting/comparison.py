"""Several runs side by side: the table of a report."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecn_dist.errors import UserError
from ecn_dist.reporting.run_reader import number, read_mapping
from ecn_dist.reporting.words import MEASURES, percent


@dataclass(frozen=True)
class Comparison:
    """Results of several runs side by side: for every row one evaluation (a dict with some of MEASURES) a seed."""

    rows: Mapping[str, Sequence[Mapping[str, float]]]
    title: str = "Comparison"
    note: str = ""


def comparison_table(comparison: Comparison) -> dict[str, Any]:
    """Heads and cells: mean and sample standard deviation over the seeds, in percent; the best mean is marked.

    `bar` is the length of the bar behind a row's name, in percent: its first measure.
    """
    values = {
        name: {key: [value for run in runs if (value := number(run.get(key))) is not None] for key in MEASURES}
        for name, runs in comparison.rows.items()
    }
    means = {name: {key: statistics.fmean(of[key]) for key in MEASURES if of[key]} for name, of in values.items()}
    shown = [key for key in MEASURES if any(key in of for of in means.values())]
    best = {key: max(of[key] for of in means.values() if key in of) for key in shown}
    rows = []
    for name, runs in comparison.rows.items():
        cells = [
            {
                "mean": percent(means[name][key]) if key in means[name] else "",
                "spread": percent(statistics.stdev(values[name][key])) if len(values[name][key]) > 1 else "",
                "best": means[name].get(key) == best[key] and len(comparison.rows) > 1,
            }
            for key in shown
        ]
        bar = min(max(means[name].get(shown[0], 0.0), 0.0), 1.0) if shown else 0.0
        rows.append({"name": name, "seeds": len(runs), "cells": cells, "bar": percent(bar)})
    return {
        "title": comparison.title,
        "note": comparison.note,
        "heads": [MEASURES[key] for key in shown],
        "rows": rows,
        "several_seeds": any(len(runs) > 1 for runs in comparison.rows.values()),
    }


def read_comparison(path: Path) -> Comparison | None:
    """The comparison that an earlier report kept; None where there is none."""
    if (found := read_mapping(path)) is None:
        return None
    try:
        comparison = Comparison(**found)
        comparison_table(comparison)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no comparison ({error}); remove it") from error
    return comparison
