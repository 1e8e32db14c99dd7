"""Two checkouts compared: made-up ones, one three times as slow as the other."""

from pathlib import Path

import pytest

from benchmarks import compare
from ecn_dist.errors import UserError

SNIPPET = """
import time
import ecn_dist
print("a line that is no answer")
with open(ecn_dist.LOG, "a") as log:
    print("ready", file=log)

def run():
    with open(ecn_dist.LOG, "a") as log:
        print(ecn_dist.NAME, file=log)
    time.sleep(ecn_dist.SECONDS)
"""


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    for name, seconds in (("new", 0.02), ("old", 0.06)):
        (tmp_path / name / "ecn_dist").mkdir(parents=True)
        constants = {"NAME": name, "SECONDS": seconds, "LOG": str(tmp_path / "log")}
        text = "".join(f"{key} = {value!r}\n" for key, value in constants.items())
        (tmp_path / name / "ecn_dist" / "__init__.py").write_text(text)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    return [tmp_path / "new", tmp_path / "old"]


def test_both_run_in_turn(checkouts: list[Path], tmp_path: Path) -> None:
    new, old = compare.compare(tmp_path / "snippet.py", checkouts, rounds=4)
    assert len(new) == len(old) == 4
    assert min(new) >= 0.02
    assert min(old) >= 0.06
    timed = (tmp_path / "log").read_text().split()[-8:]
    assert timed == ["new", "old", "old", "new"] * 2


def test_table(checkouts: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "HERE", checkouts[0])
    assert (
        compare.main([str(tmp_path / "snippet.py"), "--against", str(checkouts[1]), "--rounds", "3", "--starts", "2"])
        == 0
    )
    out = capsys.readouterr().out
    assert str(checkouts[0]) in out
    assert "snippet, 6 rounds: the other takes" in out
    assert "quartiles" in out


def test_what_cannot_be_compared(checkouts: list[Path], tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    with pytest.raises(UserError, match="nowhere"):
        compare.main([str(snippet), "--against", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--rounds 1"):
        compare.main([str(snippet), "--against", str(checkouts[1]), "--rounds", "1"])
    (checkouts[1] / "ecn_dist" / "__init__.py").write_text("NAME = 'broken'\n")
    with pytest.raises(UserError, match=f"{checkouts[1]}: the snippet failed"):
        compare.compare(snippet, checkouts, rounds=2)
    (checkouts[1] / "ecn_dist").rename(checkouts[1] / "moved")
    (checkouts[1] / "ecn_dist.py").symlink_to(checkouts[0] / "ecn_dist" / "__init__.py")
    (tmp_path / "other.py").write_text(SNIPPET + f"ecn_dist.__file__ = {str(tmp_path / 'elsewhere.py')!r}\n")
    with pytest.raises(UserError, match=r"took the package .*elsewhere.py"):
        compare.compare(tmp_path / "other.py", checkouts[1:], rounds=2)
