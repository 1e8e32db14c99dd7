"""A URL's bytes, with patience, with an end to it, and never more than were announced.

`http:` and `https:` by Python's own client, `pipe:COMMAND` from a shell, anything else (`s3:`, `gs:`, ...) by fsspec
with the package that it needs.
"""

import atexit
import os
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException

from ecn_dist.errors import UserError

CHUNK_BYTES = 1 << 20
EXIT_SECONDS = 1.0  # for a command to end after its last byte
SECRET = re.compile(r"(?i)((?:bearer|basic|token|secret|password|key|signature)[\w-]*['\"]?[=:\s]+)[^\s'\"&]+")


@dataclass(frozen=True)
class Patience:
    """How long to try. A source that delivers nothing is given up within three minutes by default, before the other
    ranks' collectives give up; and at the least rate, a shard of 64 MiB arrives in less than five."""

    attempts: int = 4
    stall_seconds: float = 30.0  # an attempt ends when it is so far behind the least rate
    backoff_seconds: float = 1.0  # before the second attempt; doubles with each
    least_rate: int = 256 << 10  # bytes a second; what comes faster earns no more than `stall_seconds`


class FetchError(Exception):
    """One attempt failed; the text says how."""


def shown(url: str) -> str:
    """An address or a path for a message: without what may be a secret, and in one printable line."""
    if url.startswith("pipe:"):
        url = SECRET.sub(r"\1***", url)
    elif "://" in url:
        scheme, host, path, _, _ = urllib.parse.urlsplit(url)
        url = f"{scheme}://{host.rpartition('@')[2]}{path}"
    return "".join(c if c.isprintable() else "?" for c in url)


def fetch(
    url: str, receive: Callable[[Iterator[bytes]], None], patience: Patience | None = None, limit: int | None = None
) -> None:
    """Hand the chunks of `url` to `receive`, anew with every attempt.

    Args:
        url: see the head of this module.
        receive: consumes the chunks; raises `FetchError` where they are not what they should be.
        patience: how long to try.
        limit: bytes; an attempt that delivers more has failed.

    Raises:
        UserError: every attempt failed, or no package here opens such an address.
    """
    patience = patience or Patience()
    problems = []
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.backoff_seconds * 2 ** (attempt - 1))
        try:
            receive(_limited(_chunks(url, patience), limit))
            return
        except FetchError as error:
            problems.append(str(error))
    raise UserError(
        f"{shown(url)} cannot be fetched, after {patience.attempts} attempts: {problems[-1]}. Check the address, the "
        "access rights and the network of this host, or copy the shard folder to a local path"
    )


def fetch_bytes(url: str, limit: int, patience: Patience | None = None) -> bytes:
    """All of `url`, in memory, if it has at most `limit` bytes. `UserError` where it cannot be had."""
    data = bytearray()

    def receive(chunks: Iterator[bytes]) -> None:
        data.clear()
        for chunk in chunks:
            data.extend(chunk)

    fetch(url, receive, patience, limit)
    return bytes(data)


def end_commands() -> None:
    """End what is still fetching, for a process that ends without going through its `finally` blocks."""
    for command in tuple(_running):
        command.close()


def _limited(chunks: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if limit is not None and received > limit:
            raise FetchError(f"more than the {limit} bytes that were announced")
        yield chunk


class _Command:
    """A shell command whose output is read, in a process group: what a shell starts does not end with the shell."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, process_group=0
        )
        _running.add(self)

    def read(self, seconds: float) -> bytes:
        """What has arrived; `TimeoutError` where nothing does within so many seconds."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        data = os.read(self._process.stdout.fileno(), CHUNK_BYTES)
        if not data:
            try:
                status = self._process.wait(max(seconds, EXIT_SECONDS))
            except subprocess.TimeoutExpired as error:
                raise FetchError("the command did not end after its last byte") from error
            if status:
                raise FetchError(f"the command ended with status {status}")
        return data

    def close(self) -> None:
        """End it and all that it started."""
        if self._process.returncode is None:  # not asked with poll(): until it is reaped, its number stays its own
            with suppress(ProcessLookupError, PermissionError):  # the latter: sudo; it ends when it writes again
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdout is not None:
            self._process.stdout.close()
        _running.discard(self)


class _Http:
    """An answer of a web server; a read waits as long as was said when it was opened."""

    def __init__(self, url: str, seconds: float) -> None:
        try:
            self._answer = urllib.request.urlopen(url, timeout=seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise FetchError(f"the server answered with an error ({error.code} {error.reason})") from error
        except urllib.error.URLError as error:
            raise FetchError(f"no connection to the host ({error.reason})") from error
        self.close = self._answer.close

    def read(self, seconds: float) -> bytes:
        data: bytes = self._answer.read1(CHUNK_BYTES)
        if not data and self._answer.length:
            raise FetchError(f"the connection broke off, {self._answer.length} bytes before the end")
        return data


class _Fsspec:
    """A file of any file system that fsspec knows; how long a read waits is that one's matter."""

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]  # only such addresses need it

        try:
            self._file = fsspec.open(url, "rb").open()
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{shown(url)}: nothing here opens such an address ({error}). Or fetch it by a command, for s3: "
                "pipe:aws s3 cp s3://BUCKET/FOLDER/{} -"
            ) from error
        self.close = self._file.close

    def read(self, seconds: float) -> bytes:
        data: bytes = self._file.read(CHUNK_BYTES)
        return data


_running: set[_Command] = set()  # that this process started and has not ended
atexit.register(end_commands)  # threads that fetch ahead are daemons
os.register_at_fork(after_in_child=_running.clear)


def _open(url: str, seconds: float) -> _Command | _Http | _Fsspec:
    if url.startswith("pipe:"):
        return _Command(url.removeprefix("pipe:"))
    return _Http(url, seconds) if url.startswith(("http://", "https://")) else _Fsspec(url)


def _chunks(url: str, patience: Patience) -> Iterator[bytes]:
    """What arrives, as long as it comes fast enough; the time that the receiver takes does not count."""
    credit = patience.stall_seconds
    source = None
    try:
        source = _open(url, patience.stall_seconds)
        while True:
            begun = time.monotonic()
            chunk = source.read(max(credit, 0.0))
            credit -= time.monotonic() - begun
            if not chunk:
                return
            if credit < 0:
                raise TimeoutError
            credit = min(credit + len(chunk) / patience.least_rate, patience.stall_seconds)
            yield chunk
    except TimeoutError as error:
        if credit == patience.stall_seconds:
            raise FetchError(f"nothing arrived for {patience.stall_seconds:g} s") from error
        raise FetchError(f"fewer than {patience.least_rate} bytes a second arrived") from error
    except (OSError, HTTPException) as error:
        raise FetchError(str(error) or type(error).__name__) from error
    finally:
        if source is not None:
            source.close()
