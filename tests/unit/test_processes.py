"""Jobs over processes: results in order, errors, and workers that die."""

import os
import signal
import subprocess
import sys

import pytest

from ecn_dist.errors import UserError
from ecn_dist.processes import choose_workers, run_jobs


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 2:
        raise UserError("two is too many")
    return number


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 1, 2, 9])
def test_results_come_in_order(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_jobs(square, range(4), workers, "squares") == [0, 1, 4, 9]
    assert capsys.readouterr() == ("", "")  # no terminal


@pytest.mark.parametrize("workers", [1, 2])
def test_a_terminal_shows_a_bar(
    workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert run_jobs(square, range(4), workers, "squares") == [0, 1, 4, 9]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "squares" in shown.err
    assert "100%" in shown.err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_jobs_error_is_raised(workers: int) -> None:
    with pytest.raises(UserError, match="two is too many"):
        run_jobs(refuse, range(4), workers)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(UserError, match=r"one of 2 worker processes ended unexpectedly.*--workers"):
        run_jobs(die, range(4), 2)


@pytest.mark.timeout(60)
def test_workers_end_with_their_parent() -> None:
    """Also with one that was killed: the workers hold its standard output open until they end."""
    job = "print('up', flush=True); import time; time.sleep(99)"
    code = f"from ecn_dist.processes import run_jobs; run_jobs(exec, [{job!r}] * 2, 2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
        parent.kill()
        assert parent.stdout.read() == b""


def test_few_pictures_are_not_worth_processes() -> None:
    assert choose_workers(None, 10) == 1
    assert choose_workers(None, 10**6) >= 1
    assert choose_workers(3, 10) == 3
