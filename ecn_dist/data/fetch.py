"""A URL's bytes, through webdataset's opener (`https:`, `pipe:`, `gs:`, ...), with patience and with an end to it."""

import atexit
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from subprocess import TimeoutExpired
from typing import Any

from ecn_dist.errors import UserError

CHUNK_BYTES = 1 << 20
PIPE_BUFFER = 8192  # webdataset's
EXIT_SECONDS = 1.0  # for a command to end after its last byte
CURL_STATUS = {
    6: "no such host",
    7: "no connection to the host",
    18: "the connection broke off",
    22: "the server answered with an error",
    28: "timed out",
}


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


def fetch(url: str, receive: Callable[[Iterator[bytes]], None], patience: Patience | None = None) -> None:
    """Hand the chunks of `url` to `receive`, anew with every attempt.

    Args:
        url: anything webdataset opens.
        receive: consumes the chunks; raises `FetchError` where they are not what they should be.
        patience: how long to try.

    Raises:
        UserError: every attempt failed.
    """
    patience = patience or Patience()
    problems = []
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.backoff_seconds * 2 ** (attempt - 1))
        try:
            receive(_chunks(url, patience))
            return
        except (FetchError, OSError, TimeoutExpired) as error:
            problems.append(str(error))
    raise UserError(
        f"{url} cannot be fetched, after {patience.attempts} attempts: {problems[-1]}. Check the address, the access "
        "rights and the network of this host, or copy the shard folder to a local path"
    )


def fetch_bytes(url: str, patience: Patience | None = None) -> bytes:
    """All of `url`, in memory. `UserError` where it cannot be had."""
    data = bytearray()

    def receive(chunks: Iterator[bytes]) -> None:
        data.clear()
        for chunk in chunks:
            data.extend(chunk)

    fetch(url, receive, patience)
    return bytes(data)


def end_commands() -> None:
    """End what is still fetching, for a process that ends without going through its `finally` blocks."""
    for process in tuple(_running):
        _kill(process)


_running: set[Any] = set()  # the processes that this one started and has not ended
atexit.register(end_commands)  # threads that fetch ahead are daemons
os.register_at_fork(after_in_child=_running.clear)


def _chunks(url: str, patience: Patience) -> Iterator[bytes]:
    stream = _open(url)
    process = getattr(stream, "proc", None)
    if process is not None:
        _running.add(process)
    try:
        if process is None:  # an opener without a process of its own: its reads may block
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
        else:
            yield from _from_process(process, patience)
    finally:
        if process is not None:
            if process.returncode is None:  # not asked with poll(): until it is reaped, its number stays its own
                _kill(process)
            _running.discard(process)
        with suppress(OSError):  # of a killed process
            stream.close()


def _open(url: str) -> Any:
    import webdataset  # takes a second to import, and only URLs need it
    from webdataset import utils
    from webdataset.gopen import Pipe, gopen_pipe, gopen_schemes, rewrite_url

    try:
        address = rewrite_url(url)
        own = gopen_schemes["pipe"] is gopen_pipe and not utils.enforce_security
        if own and address.startswith("pipe:"):
            # As webdataset opens it, but in a process group: what a shell starts does not end with the shell.
            command = address.removeprefix("pipe:")
            return Pipe(command, mode="rb", shell=True, bufsize=PIPE_BUFFER, process_group=0)
        return webdataset.gopen(url)
    except ValueError as error:
        raise UserError(
            f"{url}: webdataset has no opener for it ({error}). For s3: pipe:aws s3 cp s3://BUCKET/FOLDER/{{}} -"
        ) from error


def _from_process(process: Any, patience: Patience) -> Iterator[bytes]:
    descriptor = process.stdout.fileno()
    credit = patience.stall_seconds  # to wait; the time that the receiver takes does not count
    while True:
        begun = time.monotonic()
        ready, _, _ = select.select([descriptor], [], [], max(credit, 0.0))
        if not ready:
            if credit == patience.stall_seconds:
                raise FetchError(f"nothing arrived for {patience.stall_seconds:g} s")
            raise FetchError(f"fewer than {patience.least_rate} bytes a second arrived")
        chunk = os.read(descriptor, CHUNK_BYTES)
        if not chunk:
            break
        earned = len(chunk) / patience.least_rate
        credit = min(credit - (time.monotonic() - begun) + earned, patience.stall_seconds)
        yield chunk
    status = process.wait(max(credit, EXIT_SECONDS))
    if status:
        curl = isinstance(process.args, list) and process.args[0] == "curl"
        meaning = f" ({CURL_STATUS[status]})" if curl and status in CURL_STATUS else ""
        raise FetchError(f"{'curl' if curl else 'the command'} ended with status {status}{meaning}")


def _kill(process: Any) -> None:
    with suppress(ProcessLookupError, PermissionError):  # the latter: sudo; it ends when it writes again
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
