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
        key: [
            [value for run in runs if (value := number(run.get(key))) is not None] for runs in comparison.rows.values()
        ]
        for key in MEASURES
    }
    shown = [key for key in MEASURES if any(values[key])]
    best = {key: max(statistics.fmean(found) for found in values[key] if found) for key in shown}
    rows = []
    for line, (name, runs) in enumerate(comparison.rows.items()):
        cells, bar = [], "0"
        for key in shown:
            found = values[key][line]
            mean = statistics.fmean(found) if found else None
            spread = f"{100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
            is_best = mean == best[key] and len(comparison.rows) > 1
            cells.append({"mean": "" if mean is None else percent(mean), "spread": spread, "best": is_best})
            if key == shown[0] and mean is not None:
                bar = f"{100 * min(max(mean, 0.0), 1.0):.1f}"
        rows.append({"name": name, "seeds": len(runs), "cells": cells, "bar": bar})
    return {
        "title": comparison.title,
        "note": comparison.note,
        "heads": [MEASURES[key] for key in shown],
        "rows": rows,
        "several_seeds": any(len(runs) > 1 for runs in comparison.rows.values()),
    }


def read_comparison(path: Path) -> Comparison | None:
    """The comparison that an earlier report kept; None where there is none."""
    found = read_mapping(path)
    if found is None:
        return None
    try:
        comparison = Comparison(**found)
        comparison_table(comparison)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no comparison ({error}); remove it") from error
    return comparison
