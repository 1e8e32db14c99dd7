"""A request to stop, and more of them on the way out."""

import os
import signal
import subprocess
import sys

import pytest

from ecn_dist.training.signals import EXIT_PREEMPTED, SIGNALS, stop_on_signals


def test_the_first_signal_is_noted_and_later_ones_are_ignored_until_the_end() -> None:
    code = f"""
import atexit, os, signal, sys
from ecn_dist.training.signals import stop_on_signals
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == "SIGTERM"
for number in {[int(number) for number in SIGNALS]}:
    os.kill(os.getpid(), number)
sys.exit({EXIT_PREEMPTED})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == EXIT_PREEMPTED


def test_without_a_request_the_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_on_signals() as stop:
        assert not stop
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_of_another_rank_counts(number: signal.Signals) -> None:
    before = {known: signal.getsignal(known) for known in SIGNALS}
    with stop_on_signals() as stop:
        stop.signal = "another rank's signal"
    try:
        os.kill(os.getpid(), number)
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
