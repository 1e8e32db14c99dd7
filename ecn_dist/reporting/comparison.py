"""Several runs side by side: the table of a report."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecn_dist.errors import UserError
from ecn_dist.reporting.words import MEASURES, is_number, percent


@dataclass(frozen=True)
class Comparison:
    """Results of several runs side by side: for every row one evaluation (a dict with some of MEASURES) a seed."""

    rows: Mapping[str, Sequence[Mapping[str, float]]]
    title: str = "Comparison"
    note: str = ""


def comparison_table(comparison: Comparison) -> dict[str, Any]:
    """Heads and cells: mean and sample standard deviation over the seeds, in percent; the best mean is marked."""
    measures = [key for key in MEASURES if any(_values(runs, key) for runs in comparison.rows.values())]
    means = {
        key: [statistics.fmean(values) if (values := _values(runs, key)) else None for runs in comparison.rows.values()]
        for key in measures
    }
    rows = []
    for line, (name, runs) in enumerate(comparison.rows.items()):
        cells = []
        for key in measures:
            values, mean = _values(runs, key), means[key][line]
            best = mean is not None and mean == max(value for value in means[key] if value is not None)
            spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            text = "" if mean is None else percent(mean)
            cells.append({"mean": text, "spread": spread, "best": best and len(comparison.rows) > 1})
        rows.append({"name": name, "seeds": len(runs), "cells": cells, "bar": _bar(means, line)})
    return {
        "title": comparison.title,
        "note": comparison.note,
        "heads": [MEASURES[key] for key in measures],
        "rows": rows,
        "several_seeds": any(len(runs) > 1 for runs in comparison.rows.values()),
    }


def _bar(means: Mapping[str, Sequence[float | None]], line: int) -> str:
    """Length of the bar behind a row, in percent of its cell: the mAP, or the first measure there is."""
    for values in means.values():
        value = values[line]
        return f"{100 * min(max(value, 0.0), 1.0):.1f}" if value is not None else "0"
    return "0"


def _values(runs: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [float(run[key]) for run in runs if is_number(run.get(key))]


def read_comparison(path: Path) -> Comparison | None:
    """The comparison that an earlier report kept; None where there is none."""
    if not path.is_file():
        return None
    try:
        comparison = Comparison(**json.loads(path.read_text(encoding="utf-8")))
        comparison_table(comparison)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no comparison ({error}); remove it") from error
    return comparison
