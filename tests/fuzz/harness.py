"""One case: damaged input in a folder of its own, what reads it, and what may come of that.

A reader ends as a command does: with status 0 and the right result, or (validate) 1, or with status 2 and one text.
Every other exception, a result that is not what the input says (the target asserts), a case that takes too long or too
much memory, a file opened for writing or a process started where none belongs, and a text that could move a terminal's
cursor is a failure.
"""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ecn_dist.command import command

SECONDS = 20.0  # of a case
MEMORY_BYTES = 3 << 30  # of address space, beyond what the process has when the cases begin
TEXT_LIMIT = 8000  # characters that a command says
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {
    "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1,
}  # fmt: skip
STARTING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "pickle.find_class")
CONNECTING = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")


class TooSlow(BaseException):
    """A case took longer than it may; no `except Exception` is to catch it."""


@dataclass
class Place:
    """The folders of one case."""

    root: Path
    commands: str = ""  # a regular expression of the commands that it may start
    thorough: bool = False  # whether to do what takes longer, too

    @property
    def input(self) -> Path:
        """What is damaged; nobody writes here."""
        return self.root / "input"

    @property
    def output(self) -> Path:
        """Where commands may write."""
        return self.root / "output"


class Target(NamedTuple):
    """One kind of input."""

    name: str
    weight: int
    """share of the cases"""
    make: Callable[[Random, Place], str]
    """write damaged input; returns what was done, in a few words"""
    read: Callable[[Place], None]
    """read it, by `ended`, and assert that what comes of it is right"""


class Ended(NamedTuple):
    """How a reader ended."""

    status: int
    value: Any
    text: str


def ended(
    place: Place,
    function: Callable[[], Any],
    *,
    statuses: tuple[int, ...] = (0, 2),
    named: bool = True,
    beside: Path | None = None,
) -> Ended:
    """Run `function` as a command is run: it returns a value, or (a command's `main`) an exit status.

    `named`: an error must name a file of the case, or that one `beside` which it is read with.
    """
    box: list[Any] = [None]

    def main(argv: list[str] | None = None) -> int:
        box[0] = function()
        return box[0] if isinstance(box[0], int) else 0

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command(main)()
    text = out.getvalue() + err.getvalue()
    assert status in statuses, f"status {status}: {text!r}"
    raw = {letter for letter in text if not letter.isprintable() and letter != "\n"}
    assert not raw, f"{raw} reach the terminal: {text!r}"
    assert len(text) <= TEXT_LIMIT, f"{len(text)} characters: {text[:300]!r} ..."
    if status == 2:
        first, *others = err.getvalue().rstrip("\n").split("error: ", 1)[-1].split("\n")
        assert "error: " in err.getvalue(), f"no error is told: {text!r}"
        assert first.strip(), f"no error is told: {text!r}"
        assert all(line.startswith("  ") for line in others), f"lines that could be another's: {text!r}"
        names = [str(place.root), *(path.name for path in place.input.rglob("*")), *([str(beside)] if beside else [])]
        assert not named or any(name in text for name in names), f"no file is named: {text!r}"
    return Ended(status, box[0], text)


@dataclass
class Watch:
    """What the process does beside reading, by Python's audit events."""

    place: Place | None = None
    deeds: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) if isinstance(flags, int) else bool(set(str(mode)) & set("wax+"))
            if writes and not self._is_own(path):
                self._note(f"opened for writing: {path!r}")
        elif event in CHANGING:
            for path in arguments[: CHANGING[event]]:
                if not self._is_own(path):
                    self._note(f"{event} {path!r}")
        elif event == "subprocess.Popen":
            started = arguments[1] if isinstance(arguments[1], str) else " ".join(map(str, arguments[1] or ()))
            shell = started.removeprefix("/bin/sh -c ")
            if not self.place.commands or not re.fullmatch(self.place.commands, shell):
                self._note(f"started: {started!r}")
        elif event in STARTING or event in CONNECTING:
            self._note(f"{event} {arguments!r:.200}")

    def _is_own(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        assert self.place is not None
        absolute = os.path.abspath(os.fsdecode(path))
        own = absolute.startswith(f"{self.place.root}/") and not absolute.startswith(f"{self.place.input}/")
        return own or absolute in ("/dev/null", "/dev/tty") or absolute.startswith("/dev/shm/")

    def _note(self, deed: str) -> None:
        if "matplotlib" not in deed:  # which keeps a cache of fonts
            self.deeds.append(deed)


_watch: Watch | None = None


def _the_watch() -> Watch:
    """An audit hook stays for as long as the process, so there is one."""
    global _watch
    if _watch is None:
        _watch = Watch()
        sys.addaudithook(_watch)
    return _watch


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """More than MEMORY_BYTES beyond what the process has now cannot be had: allocations fail."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` after so many seconds; a timer that was set goes on afterwards."""

    def stop(*_: object) -> None:
        raise TooSlow(f"takes longer than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def run_case(target: Target, seed: int, number: int, root: Path) -> str | None:
    """Case `number` of `seed`; what went wrong, or None. `root` is emptied first."""
    shutil.rmtree(root, ignore_errors=True)
    place = Place(root)
    for folder in (place.input, place.output, root / "cwd", root / "tmp", root / "cache"):
        folder.mkdir(parents=True)
    rng = Random(f"{seed} {number}")
    place.thorough = rng.random() < 0.2
    what = target.make(rng, place)
    watch, before = _the_watch(), (os.getcwd(), tempfile.tempdir)
    os.chdir(root / "cwd")
    tempfile.tempdir = str(root / "tmp")
    watch.place, problem, threads = place, None, set(threading.enumerate())
    try:
        with limited_time(SECONDS):
            target.read(place)
    except (Exception, TooSlow) as error:
        problem = "".join(traceback.format_exception(error)[-8:])
    finally:
        for thread in set(threading.enumerate()) - threads:  # one that fetches ahead ends after the shard it is at
            thread.join(SECONDS)
        watch.place = None
        os.chdir(before[0])
        tempfile.tempdir = before[1]
    deeds, watch.deeds = watch.deeds, []
    left = [str(path) for path in (root / "cwd").rglob("*")]
    if problem is None and not deeds and not left:
        return None
    return f"case {number} of seed {seed}, {target.name}: {what}\n{problem or ''}{' '.join(map(str, deeds + left))}"
