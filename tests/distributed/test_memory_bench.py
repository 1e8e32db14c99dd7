"""The memory benchmark inside a group of ranks."""

import pytest

from benchmarks import memory as bench


def check_case(dtype: str) -> None:
    """The benchmark checks by itself that the sharded and the published memory agree on every rank."""
    options = ["--exemplars", "50", "--dims", "16", "--batches", "12", "--rounds", "1", "--dtypes", dtype]
    (row,) = bench.measure(bench.parser().parse_args(options))
    assert row["published / step"] > 0
    assert row["sent MB"] > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_formulations_agree(ranks, world_size: int) -> None:
    for dtype in ("float64", "float32"):
        ranks(world_size).run(check_case, dtype)
