"""Several runs side by side: the table of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

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
    """Heads and lines of cells: means in percent, with the sample standard deviation where there are several seeds."""
    values = {
        name: {key: [value for run in runs if (value := number(run.get(key))) is not None] for key in MEASURES}
        for name, runs in comparison.rows.items()
    }
    best = {key: max(map(fmean, some)) for key in MEASURES if (some := [of[key] for of in values.values() if of[key]])}
    several = any(len(runs) > 1 for runs in comparison.rows.values())

    def cell(found: list[float], highest: float) -> str:
        if not found:
            return ""
        spread = f" ± {percent(stdev(found))}" if len(found) > 1 else ""
        is_best = len(values) > 1 and fmean(found) == highest
        return Markup("<b>{}</b>{}" if is_best else "{}{}").format(percent(fmean(found)), spread)

    return {
        "title": comparison.title,
        "note": comparison.note,
        "heads": ["Row", *(MEASURES[key][0] for key in best), *["seeds"] * several],
        "lines": [
            [name, *(cell(of[key], best[key]) for key in best), *[len(comparison.rows[name])] * several]
            for name, of in values.items()
        ],
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
