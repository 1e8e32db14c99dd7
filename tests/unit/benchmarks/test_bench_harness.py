"""The helpers that every benchmark shares."""

import argparse
import json
import time

import torch

from benchmarks import __main__ as bench
from benchmarks import harness


def test_alternate_times_each_side_in_turn() -> None:
    calls: list[str] = []
    sides = {"slow": lambda: (calls.append("slow"), time.sleep(0.02)), "fast": lambda: calls.append("fast")}
    seconds = harness.alternate(sides, rounds=4, warmup=1)
    assert calls == ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert min(seconds["slow"]) >= 0.02 > harness.medians(seconds)["fast"]
    assert harness.median_ratio(seconds["slow"], seconds["fast"]) > 1
    assert harness.median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 4.0]) == 2.0


def test_peak_tensor_bytes_is_exact() -> None:
    def work() -> None:
        kept = torch.zeros(1000)
        torch.zeros(3000)  # freed at once
        torch.zeros(2000)
        del kept

    assert harness.peak_tensor_bytes(work) == 4 * 4000


def test_table_and_results(tmp_path, capsys) -> None:
    rows = [{"N": 10, "ratio": 1.23456}, {"N": 2000, "ratio": None, "more": 5}]
    table = harness.markdown_table(rows)
    assert table.splitlines() == [
        "|    N | ratio | more |",
        "|-----:|------:|-----:|",
        "|   10 | 1.235 |    - |",
        "| 2000 |     - |    5 |",
    ]
    parser = argparse.ArgumentParser()
    harness.add_options(parser)
    described = harness.machine()
    harness.report(parser.parse_args([]), "steps", described, rows, table)
    assert capsys.readouterr().out == f"{table}\n"
    harness.report(parser.parse_args(["--output", str(tmp_path / "new")]), "steps", described, rows, table)
    (results,) = (tmp_path / "new").glob("steps-*.json")
    assert " " not in results.name
    assert json.loads(results.read_text())["results"] == rows
    text = results.with_suffix(".md").read_text()
    assert text.startswith("# Benchmark: steps")
    assert table in text
    assert str(described["torch"]) in text


def test_unknown_benchmark_fails(capsys) -> None:
    assert bench.main(["nothing"]) == 2
    assert "no such benchmark: 'nothing'" in capsys.readouterr().err
    assert bench.main(["--help"]) == 0
