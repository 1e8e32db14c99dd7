"""A URL's bytes, through webdataset's opener (`https:`, `pipe:`, `gs:`, ...), with patience and with an end to it."""

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from subprocess import TimeoutExpired
from typing import Any

from ecn_dist.errors import UserError

CHUNK_BYTES = 1 << 20
CURL_STATUS = {
    6: "no such host",
    7: "no connection to the host",
    18: "the connection broke off",
    22: "the server answered with an error",
    28: "timed out",
}


@dataclass(frozen=True)
class Patience:
    """How long to try. The defaults end within three minutes, before the other ranks' collectives give up."""

    attempts: int = 4
    stall_seconds: float = 30.0  # an attempt ends when nothing arrives for so long
    backoff_seconds: float = 1.0  # before the second attempt; doubles with each


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
            receive(_chunks(url, patience.stall_seconds))
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


def _chunks(url: str, stall_seconds: float) -> Iterator[bytes]:
    import webdataset  # takes a second to import, and only URLs need it

    try:
        stream = webdataset.gopen(url)
    except ValueError as error:
        raise UserError(
            f"{url}: webdataset has no opener for it ({error}). For s3: pipe:aws s3 cp s3://BUCKET/FOLDER/{{}} -"
        ) from error
    try:
        process = getattr(stream, "proc", None)
        if process is None:  # an opener without a process of its own: its reads may block
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
        else:
            yield from _from_process(process, stall_seconds)
    finally:
        _abandon(stream)


def _from_process(process: Any, stall_seconds: float) -> Iterator[bytes]:
    descriptor = process.stdout.fileno()
    while True:
        ready, _, _ = select.select([descriptor], [], [], stall_seconds)
        if not ready:
            raise FetchError(f"nothing arrived for {stall_seconds:g} s")
        chunk = os.read(descriptor, CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    status = process.wait(stall_seconds)
    if status:
        curl = isinstance(process.args, list) and process.args[0] == "curl"
        meaning = f" ({CURL_STATUS[status]})" if curl and status in CURL_STATUS else ""
        raise FetchError(f"{'curl' if curl else 'the command'} ended with status {status}{meaning}")


def _abandon(stream: Any) -> None:
    process = getattr(stream, "proc", None)
    if process is not None and process.poll() is None:
        process.kill()
    with suppress(OSError):  # of a killed process
        stream.close()
