"""The short run of the fuzzer, and that it finds what it is made to find. `make test-fuzz` is the long one."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from ecn_dist.errors import UserError
from tests.fuzz.__main__ import run
from tests.fuzz.harness import Place, Target, ended, run_case

SEED, CASES, SECONDS = 7, 250, 10.0


def test_damaged_and_hostile_input(tmp_path: Path) -> None:
    """As many of these cases as there is time for; they are the same every time."""
    failures = run(SEED, range(CASES), seconds=SECONDS, root=tmp_path)
    assert not failures, "\n\n".join(failures)


def make(rng: Random, place: Place) -> str:
    (place.input / "file").write_bytes(rng.randbytes(8))
    return "a file"


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda place: {}["x"], "KeyError"),
        (lambda place: fail(UserError("something is wrong")), "no file is named"),
        (lambda place: fail(UserError("")), "no error is told"),
        (lambda place: print("\x1b[2J"), "reach the terminal"),
        (lambda place: print("x" * 9000), "9001 characters"),
        (lambda place: 1, "status 1"),
        (lambda place: (place.root.parent / "outside").write_bytes(b""), "opened for writing"),
        (lambda place: (place.input / "file").write_bytes(b""), "opened for writing"),
        (lambda place: (place.input / "file").unlink(), "os.remove"),
        (lambda place: subprocess.run("touch PWNED", shell=True, check=True) and None, "started"),
        (lambda place: os.system("true") and None, "os.system"),
        (lambda place: time.sleep(30), "takes longer than"),
        (lambda place: len(bytearray(1 << 33)) and None, "MemoryError"),
    ],
)
def test_what_is_wrong_is_found(
    read: Callable[[Place], object], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fuzz import harness

    monkeypatch.setattr(harness, "SECONDS", 0.3)
    target = Target("planted", 1, make, lambda place: ended(place, lambda: read(place)) and None)
    with harness.limited_memory():
        problem = run_case(target, 3, 5, tmp_path / "case")
    assert problem is not None
    assert problem.startswith("case 5 of seed 3, planted: a file")
    assert found in problem


def test_what_is_right_is_no_failure(tmp_path: Path) -> None:
    def read(place: Place) -> None:
        assert ended(place, lambda: print("well")).text == "well\n"
        assert ended(place, lambda: fail(UserError(f"{place.input}/file is damaged\nas is this"))).status == 2

    timer = signal.getitimer(signal.ITIMER_REAL)
    assert run_case(Target("planted", 1, make, read), 3, 5, tmp_path / "case") is None
    assert signal.getitimer(signal.ITIMER_REAL)[0] <= timer[0]  # a test's own time limit goes on


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        target = Target("planted", 1, make, lambda place: seen.append((place.input / "file").read_bytes()))
        assert run_case(target, 3, 5, tmp_path / "case") is None
    assert seen[0] == seen[1]
