"""The benchmark of the data path, on a few pictures."""

from benchmarks import data as bench


def test_table(capsys) -> None:
    assert bench.main(["--cameras", "3", "--pictures", "32", "--batch_size", "16", "--rounds", "1"]) == 0
    assert "stream / plain DataLoader" in capsys.readouterr().out
