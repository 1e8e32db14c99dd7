"""The helpers that every benchmark shares."""

import json
import time

import numpy as np
import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import harness


def test_alternate_times_each_side_in_turn() -> None:
    calls: list[str] = []
    sides = {"slow": lambda: (calls.append("slow"), time.sleep(0.004)), "fast": lambda: calls.append("fast")}
    seconds = harness.alternate(sides, rounds=4, warmup=1)
    assert calls == ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert min(seconds["slow"]) >= 0.004 > harness.medians(seconds)["fast"]
    assert harness.median_ratio(seconds["slow"], seconds["fast"]) > 1
    assert harness.median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 4.0]) == 2.0


def test_peak_bytes_sees_what_was_freed_again() -> None:
    def work() -> None:
        np.ones(8_000_000)  # 64 MB, freed on return

    work()
    peak = harness.peak_bytes(work)
    if peak is None:
        pytest.skip("this system has no resettable high-water mark")
    assert 60e6 < peak < 80e6


def test_peak_tensor_bytes_is_exact() -> None:
    def work() -> None:
        kept = torch.zeros(1000)
        torch.zeros(3000)  # freed at once
        torch.zeros(2000)
        del kept

    assert harness.peak_tensor_bytes(work) == 4 * 4000


def test_table_and_results(tmp_path) -> None:
    rows = [{"N": 10, "ratio": 1.23456}, {"N": 2000, "ratio": None}]
    table = harness.markdown_table(rows, {"N": "N", "ratio": "ratio", "2 N": lambda row: str(2 * row["N"])})
    assert table.splitlines() == [
        "|    N | ratio |  2 N |",
        "|-----:|------:|-----:|",
        "|   10 | 1.235 |   20 |",
        "| 2000 |     - | 4000 |",
    ]
    described = harness.machine()
    path = harness.write_results(tmp_path / "new", "memory", described, rows, name="here", title="Steps", tables=table)
    assert path.name == "memory-here.json"
    assert json.loads(path.read_text())["results"] == rows
    assert path.with_suffix(".md").read_text().splitlines()[0] == "# Steps"
    assert table in path.with_suffix(".md").read_text()
    assert " " not in harness.machine_name(described)


def test_unknown_benchmark_fails(capsys) -> None:
    assert bench.main(["nothing"]) == 2
    assert "no such benchmark: 'nothing'" in capsys.readouterr().err
    assert bench.main(["--help"]) == 0


def test_results_are_added_to_earlier_ones(tmp_path) -> None:
    described = harness.machine()

    def write(rows: list[dict], add: bool) -> list[dict]:
        if add:
            rows = harness.with_earlier(tmp_path, "b", described, rows, name="here", case=lambda row: row["N"])
        path = harness.write_results(tmp_path, "b", described, rows, name="here", title="B", tables="")
        return json.loads(path.read_text())["results"]

    write([{"N": 5, "s": 1}, {"N": 7, "s": 1}], add=True)
    assert write([{"N": 6, "s": 2}, {"N": 7, "s": 2}], add=True) == [
        {"N": 5, "s": 1},
        {"N": 6, "s": 2},
        {"N": 7, "s": 2},
    ]
    assert write([{"N": 6, "s": 3}], add=False) == [{"N": 6, "s": 3}]
