"""The bytes of an address, with patience, with an end to it, and never more than were announced.

`http:` and `https:` by Python's own client, `pipe:COMMAND` from a shell, anything else (`s3:`, `gs:`, ...) by fsspec
with the package that it needs.
"""

import atexit
import os
import re
import select
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import TypeVar

from ecn_dist.errors import UserError

CHUNK_BYTES = 1 << 20
T = TypeVar("T")
SECRET = re.compile(r"(?i)((?:bearer|basic|token|secret|password|key|signature)[\w-]*['\"]?[=:\s]+)[^\s'\"&]+")


@dataclass(frozen=True)
class Patience:
    """How long to try: by default, a source that delivers nothing is given up within three minutes, before the other
    ranks' collectives give up; and at the least rate, a shard of 64 MiB arrives in less than five."""

    attempts: int = 4
    stall_seconds: float = 30.0  # an attempt ends when it is so far behind the least rate
    backoff_seconds: float = 1.0  # before the second attempt; doubles with each
    least_rate: int = 256 << 10  # bytes a second; what comes faster earns no more than `stall_seconds`


PATIENCE = Patience()


class FetchError(Exception):
    """One attempt failed; the text says how."""


def shown(url: str) -> str:
    """An address or a path for a message: without what may be a secret, and in one printable line."""
    if url.startswith("pipe:"):
        url = SECRET.sub(r"\1***", url)
    elif "://" in url:
        url = re.sub(r"(?s)^(.*?://)(?:[^/?#]*@)?([^?#]*).*", r"\1\2", url)
    return "".join(c if c.isprintable() else "?" for c in url)


def fetch(
    url: str, receive: Callable[[Iterator[bytes]], T], patience: Patience = PATIENCE, limit: int | None = None
) -> T:
    """What `receive` makes of the chunks of `url` (see the head of this module), anew with every attempt.

    One has failed that delivers more than `limit` bytes, or whose chunks `receive` refuses by a `FetchError`. Raises
    `UserError` where every attempt failed, or no package here opens such an address.
    """
    problem = ""
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.backoff_seconds * 2 ** (attempt - 1))
        try:
            with closing(_chunks(url, patience, limit)) as chunks:
                return receive(chunks)
        except FetchError as error:
            problem = str(error)
    raise UserError(
        f"{shown(url)} cannot be fetched, after {patience.attempts} attempts: {problem}. Check the address, the access "
        "rights and the network of this host, or copy the shard folder to a local path"
    )


def fetch_bytes(url: str, limit: int, patience: Patience = PATIENCE) -> bytes:
    """All of `url`, in memory, if it has at most `limit` bytes. `UserError` where it cannot be had."""
    return fetch(url, b"".join, patience, limit)


def _chunks(url: str, patience: Patience, limit: int | None) -> Generator[bytes]:
    """What arrives, as long as it comes fast enough; the time that the receiver takes does not count."""
    credit, received, begun = patience.stall_seconds, 0, time.monotonic()
    try:
        with closing(_source(url, patience.stall_seconds)) as source:
            for chunk in source:
                credit -= time.monotonic() - begun
                if credit < 0:
                    raise FetchError(f"fewer than {patience.least_rate} bytes a second arrived")
                credit = min(credit + len(chunk) / patience.least_rate, patience.stall_seconds)
                received += len(chunk)
                if limit is not None and received > limit:
                    raise FetchError(f"more than the {limit} bytes that were announced")
                yield chunk
                begun = time.monotonic()
    except (TimeoutError, TimeoutExpired) as error:
        raise FetchError(f"nothing arrived for {patience.stall_seconds:g} s") from error
    except (OSError, HTTPException, ValueError) as error:  # the last: a redirect to what is no address
        raise FetchError(str(error) or type(error).__name__) from error


def _source(url: str, seconds: float) -> Generator[bytes]:
    """The bytes as they come. `TimeoutError` where none do for so many seconds; with fsspec that is its own matter."""
    if url.startswith("pipe:"):
        yield from _command(url.removeprefix("pipe:"), seconds)
    elif url.startswith(("http://", "https://")):
        ascii_url = urllib.parse.quote(url, safe="%" + "".join(map(chr, range(33, 127))))
        with urllib.request.urlopen(ascii_url, timeout=seconds) as answer:
            while data := answer.read1(CHUNK_BYTES):
                yield data
            if answer.length:
                raise FetchError(f"the connection broke off, {answer.length} bytes before the end")
    else:
        import fsspec  # type: ignore[import-untyped]  # only such addresses need it

        try:
            file = fsspec.open(url, "rb").open()
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{shown(url)}: nothing here opens such an address ({error}). Or fetch it by a command, for s3: "
                "pipe:aws s3 cp s3://BUCKET/FOLDER/{} -"
            ) from error
        with file:
            while data := file.read(CHUNK_BYTES):
                yield data


def _command(command: str, seconds: float) -> Generator[bytes]:
    """The output of a shell command."""
    # In a process group: what a shell starts does not end with the shell.
    process = Popen(command, shell=True, stdin=DEVNULL, stdout=PIPE, bufsize=0, process_group=0)
    assert process.stdout is not None
    _running.add(process)
    try:
        while select.select([process.stdout], [], [], seconds)[0]:
            if not (data := os.read(process.stdout.fileno(), CHUNK_BYTES)):
                break
            yield data
        else:
            raise TimeoutError
        if status := process.wait(seconds):
            raise FetchError(f"the command ended with status {status}")
    finally:
        _end(process)


def _end(process: Popen[bytes]) -> None:
    """End a command and all that it started."""
    if process.returncode is None:  # not asked with poll(): until it is reaped, its number stays its own
        with suppress(ProcessLookupError, PermissionError):  # the latter: sudo; it ends when it writes again
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    _running.discard(process)


def end_commands() -> None:
    """End what is still fetching, for a process that ends without going through its `finally` blocks."""
    for process in tuple(_running):
        _end(process)


_running: set[Popen[bytes]] = set()  # that this process started and has not ended
atexit.register(end_commands)  # threads that fetch ahead are daemons
os.register_at_fork(after_in_child=_running.clear)
