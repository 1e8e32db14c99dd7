"""The benchmark of the whole training step, on a few pictures of a small network."""

import pytest

from benchmarks import training as bench
from ecn_dist.errors import UserError

SMALL = ["--networks", "small_resnet:32x16", "--batch_size", "4", "--steps", "2", "--rounds", "2", "--workers", "0"]


@pytest.mark.parametrize("method", ["ecn", "source_only"])
def test_table(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--options", *(["model.embedding_dim=16"] if method == "ecn" else [])]
    assert bench.main([*SMALL, "--method", method, *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    row = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], lines[2])), strict=True))
    assert (row["network"], row["input"], row["method"], row["ranks"]) == ("small_resnet", "32x16", method, "1")
    assert 0 < float(row["from"]) <= float(row["train / bare"]) <= float(row["to"])
    assert float(row["bare pictures/s"]) > 0


def test_a_case_without_a_size_is_named() -> None:
    with pytest.raises(UserError, match="'resnet50' is no ARCH:HEIGHTxWIDTH"):
        bench.config_of("resnet50", bench.parser().parse_args([]), bench.Path("."))
