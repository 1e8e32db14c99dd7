"""The request to stop before the time limit: a signal, answered at the next step boundary by all ranks together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What schedulers and torchrun send ahead of the end. A second one changes nothing: the save is under way.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped and saved, start again to continue


class StopRequest:
    """Whether this process was asked to stop, and by which signal, or that another rank was."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take `SIGNALS` as requests, instead of dying of them, within the block. For the main thread.

    After a request they are ignored for good: another one on the way out would hide that the run was saved.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request else handler)
