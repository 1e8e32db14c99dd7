"""The memory benchmark on small cases (it checks by itself that all formulations agree), and its cost model."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import memory as bench
from benchmarks import memory_model, memory_sides
from benchmarks.memory_model import Rates, predict
from ecn_dist.errors import UserError

SMALL = ["--dims", "16", "--batches", "8", "--rounds", "1"]


def test_results_and_table(tmp_path) -> None:
    options = ["--exemplars", "100", "200", *SMALL, "--output", str(tmp_path), "--machine", "here"]
    assert bench.main(options) == 0
    results = json.loads((tmp_path / "memory-here.json").read_text())["results"]
    assert [row["N"] for row in results] == [100, 200]
    assert all(row["step s"] > 0 and row["/ products"] > 0 and row["sent MB"] == 0 for row in results)
    assert results[1]["peak MB"] > results[1]["rows MB a rank"] > 0
    assert "published / step" in (tmp_path / "memory-here.md").read_text()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_formulations_agree_in_every_row_type(dtype: str, capsys) -> None:
    assert bench.main(["--exemplars", "100", *SMALL, "--dtypes", dtype, "--neighbors", "0", "3"]) == 0
    assert dtype in capsys.readouterr().out


def test_a_formulation_that_differs_is_no_comparison() -> None:
    case = memory_sides.Case(100, 16, 8, 3, torch.float32, torch.device("cpu"))
    step, memory = memory_sides.sharded(case)
    wanted = step()
    published, rows = memory_sides.published(case)
    found = published()
    bench.check_agreement(found, rows, wanted, memory)
    rows[:, 0] += 0.01
    with pytest.raises(RuntimeError, match="the published rows differs"):
        bench.check_agreement(found, rows, wanted, memory)
    with pytest.raises(RuntimeError, match="the published loss differs"):
        bench.check_agreement((found[0] * 1.01, found[1]), rows, wanted, memory)


def test_rows_do_not_depend_on_who_asks() -> None:
    case = memory_sides.Case(10_000, 4, 8, 0, torch.float32, torch.device("cpu"))
    everything = case.rows(0, 10_000)
    assert torch.equal(case.rows(3000, 9000), everything[3000:9000])


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="batch 8 must divide by the ranks and be at most N = 4"):
        bench.main(["--exemplars", "4", *SMALL])


def test_cost_model() -> None:
    rates = Rates(matrix=1e12, memory=1e11, link=1e9, latency=1e-4)
    arguments = {"dim": 1000, "batch": 100, "neighbors": 5, "row_bytes": 4}
    one = predict(rates, exemplars=10**6, world_size=1, **arguments)
    assert one.products == pytest.approx(4 * 100 * 10**6 * 1000 / 1e12)
    assert one.rows == pytest.approx(4e9 / 1e11)
    assert one.transfer == one.latency == one.bytes_received == 0
    assert one.similarities == 0
    assert one.seconds == pytest.approx(one.products + one.batch)
    slow_memory = predict(replace(rates, memory=1e9), exemplars=10**6, world_size=1, similarity_bytes=4, **arguments)
    assert slow_memory.similarities == pytest.approx(100 * 10**6 * 4 / 1e9)
    assert slow_memory.seconds == pytest.approx(slow_memory.rows + slow_memory.similarities + slow_memory.batch)

    four = predict(rates, exemplars=10**6, world_size=4, **arguments)
    assert four.products == pytest.approx(one.products / 4)
    assert four.bytes_held == one.bytes_held / 4
    assert four.bytes_received == 0.75 * (100 * (4000 + 8) + 100 * 8 * (13 + 6) + 100 * 4000)
    assert predict(rates, exemplars=10**8, world_size=4, **arguments).bytes_received == four.bytes_received
    assert len(memory_model.plan()) == 3 * (2 + 1 + 2)  # 16 images on each of 64 GPUs are 1,024
