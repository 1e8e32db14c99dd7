"""Reading what a run left behind: config.yaml, metrics.jsonl and summary.json.

A run that is going on, or was killed, has only some of them; what is there and cannot be read is an error.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ecn_dist.config_gate import read_yaml
from ecn_dist.errors import UserError, printable

CONFIG, METRICS, SUMMARY, FIGURES = "config.yaml", "metrics.jsonl", "summary.json", "figures"
WEIGHTS, CARD, REPORT = "weights.safetensors", "MODEL_CARD.md", "report.html"
FINISHED = "finished"  # in the summary; one without it was written as the last thing of a run


@dataclass(frozen=True)
class RunFolder:
    """The parts of a run folder that are meant for reading; empty where there is no such file."""

    path: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # one object a step
    summary: Mapping[str, Any]

    @property
    def evaluation(self) -> Mapping[str, float]:
        """The result at the end of the run; empty where there is none."""
        return numbers(self.summary.get("evaluation"))


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder. Raises `UserError` where it is no run folder, or a file in it is broken."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give a run folder, the --output_dir of `train`")
    config, summary = read_mapping(path / CONFIG, read_yaml) or {}, read_mapping(path / SUMMARY) or {}
    metrics = merge_steps(read_metrics(path / METRICS))
    if not (config or summary or metrics or any((path / FIGURES).glob("*.png"))):
        raise UserError(f"{path}: is no run folder: no {CONFIG}, {METRICS} or {SUMMARY}; give --output_dir of train")
    return RunFolder(path, config, metrics, summary)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, as they come; empty where there is no file.

    A last line that is cut off, as a kill in mid-write leaves it, is left out. Raises `UserError`, with file and line,
    for any other line that is no JSON object with a number `step`.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row, why = json.loads(line), "with a number `step`"
        except (ValueError, RecursionError) as error:
            if at == len(lines):
                break
            row, why = None, f"({error})"
        if not isinstance(row, dict) or number(row.get("step")) is None:
            raise UserError(f"{path}: line {at} is no JSON object {why}; remove that line")
        rows.append({printable(key): value for key, value in row.items()})
    return rows


def merge_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One object a step, in their order: of what was logged again by a resumed run the later counts, key by key."""
    by_step: dict[float, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> Mapping[str, Any] | None:
    """The mapping that a file holds; None where there is no file. Raises `UserError` where it holds anything else."""
    if not path.is_file():
        return None
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (UserError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or remove it") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: holds no mapping of keys to values, but a {type(value).__name__}; mend or remove it")
    return value


def is_finished(folder: Path) -> bool:
    """Whether the run of this folder came to its end. Raises `UserError` for a summary that cannot be read."""
    summary = read_mapping(folder / SUMMARY)
    return summary is not None and bool(summary.get(FINISHED, True))


def number(value: object) -> float | None:
    """`value` where it is a finite number, else None: files may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def numbers(value: object) -> dict[str, float]:
    """What a mapping has of finite numbers; empty for anything else."""
    return {key: found for key, value in mapping(value).items() if (found := number(value)) is not None}


def mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
