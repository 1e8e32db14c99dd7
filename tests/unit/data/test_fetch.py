"""Sources that stall, trickle or leave processes behind."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ecn_dist.data import fetch as fetch_module
from ecn_dist.data.fetch import Patience, fetch, fetch_bytes, shown
from ecn_dist.errors import UserError
from tests.http_server import FolderServer
from tests.unit.data.test_stream_loader import within

IMPATIENT = Patience(attempts=3, stall_seconds=0.5, backoff_seconds=0.02)
SHARD_BYTES = 50_000


def alive(marker: str) -> list[str]:
    """The processes `sleep MARKER`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes() == f"sleep\0{marker}\0".encode():
                found.append(folder.name)
    return found


def test_a_stalled_command_is_ended_with_all_that_it_started() -> None:
    marker = f"321.{os.getpid()}"
    with pytest.raises(UserError, match=r"after 2 attempts: nothing arrived for 0\.2 s"):
        fetch_bytes(f"pipe:sleep {marker} | cat", 1, Patience(attempts=2, stall_seconds=0.2, backoff_seconds=0.0))
    assert within(2, lambda: not alive(marker))


FETCHING = """
    import importlib.util, sys, threading

    spec = importlib.util.spec_from_file_location("fetch", sys.argv[2])  # without the package, which takes seconds
    sys.modules["fetch"] = fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    threading.Thread(target=fetch.fetch_bytes, args=(f"pipe:sleep {sys.argv[1]} | cat", 1), daemon=True).start()
    print(sys.stdin.readline())
"""


def test_commands_do_not_outlive_the_process_that_ends_while_a_thread_fetches() -> None:
    marker = f"654.{os.getpid()}"
    arguments = [sys.executable, "-c", textwrap.dedent(FETCHING), marker, fetch_module.__file__]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert within(20, lambda: alive(marker))
    process.communicate(b"end\n", timeout=20)
    assert within(2, lambda: not alive(marker))


@pytest.mark.parametrize("lead", ["", "head -c 3000000 /dev/zero; "])
def test_a_source_that_trickles_has_stalled(lead: str) -> None:
    patience = Patience(attempts=2, stall_seconds=0.6, backoff_seconds=0.0, least_rate=1000)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"after 2 attempts: fewer than 1000 bytes a second arrived"):
        fetch_bytes(f"pipe:{lead}while sleep 0.05; do printf ab; done", 1 << 30, patience)
    assert 1.2 <= time.monotonic() - begun < 4  # however much came at first


def test_a_slow_source_above_the_least_rate_is_waited_for() -> None:
    patience = Patience(attempts=1, stall_seconds=0.4, least_rate=1000)
    assert (
        len(fetch_bytes("pipe:for n in 1 2 3 4 5 6 7 8; do sleep 0.1; head -c 400 /dev/zero; done", 3200, patience))
        == 3200
    )


def test_slow_consumption_is_not_taken_for_a_slow_source() -> None:
    def receive(chunks: Iterator[bytes]) -> None:
        for _ in chunks:
            time.sleep(0.3)

    fetch("pipe:for n in 1 2 3; do head -c 9 /dev/zero; sleep 0.05; done", receive, Patience(1, 0.25, least_rate=1000))


def test_the_defaults_give_up_in_time() -> None:
    patience = Patience()
    waits = sum(patience.backoff_seconds * 2**n for n in range(patience.attempts - 1))
    assert patience.attempts * patience.stall_seconds + waits < 180


@pytest.mark.timeout(30)
@pytest.mark.parametrize("source", ["pipe:cat /dev/zero", "http"])
def test_an_answer_that_never_ends_is_given_up_at_the_limit(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with endless_server() as url, pytest.raises(UserError, match="more than the 3000000 bytes that were announced"):
        fetch_bytes(url if source == "http" else source, 3_000_000, IMPATIENT)


@contextmanager
def endless_server() -> Iterator[str]:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"\0" * 100_000)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/index.json"
    server.shutdown()
    server.server_close()


def test_other_addresses_are_opened_by_fsspec(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"abc" * 1000)
    assert fetch_bytes(f"file://{tmp_path}/shard", 3000) == b"abc" * 1000
    with pytest.raises(UserError, match=r"file:.*nowhere cannot be fetched, after 1 attempts: .*No such file"):
        fetch_bytes(f"file://{tmp_path}/nowhere", 1, Patience(attempts=1))
    with pytest.raises(UserError, match=r"nonsense://bucket/x: nothing here opens such an address \(.*pipe:aws s3 cp"):
        fetch_bytes("nonsense://bucket/x", 1)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://user:secret@host:8/a/b.tar?token=secret#secret", "https://host:8/a/b.tar"),
        (
            "pipe:curl -H 'Authorization: Bearer secret' https://host/a",
            "pipe:curl -H 'Authorization: Bearer ***' https://host/a",
        ),
        (
            "pipe:AWS_SECRET_ACCESS_KEY=secret aws s3 cp s3://b/{} -",
            "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/{} -",
        ),
        ("pipe:curl 'https://host/a?sig=1&key=secret'", "pipe:curl 'https://host/a?sig=1&key=***'"),
        ("pipe:cat \x1b[2J\n/a", "pipe:cat ?[2J?/a"),
        ("/data/key = 7/my password is/a", "/data/key = 7/my password is/a"),
    ],
)
def test_messages_tell_no_secret(url: str, told: str) -> None:
    assert shown(url) == told


def test_addresses_are_quoted_or_refused(tmp_path: Path) -> None:
    (tmp_path / "grö ße").write_bytes(b"abc")
    server = FolderServer(tmp_path)
    for name in ("grö ße", "gr%C3%B6%20%C3%9Fe"):
        assert fetch_bytes(f"{server.url}/{name}", 3) == b"abc"
    server.stop()
    for url in ("http://[::1/x", f"http://{'ü' * 70}.de/x", f"http://{'a' * 300}/x"):
        with pytest.raises(UserError, match="cannot be fetched, after 1 attempts"):
            fetch_bytes(url, 3, Patience(attempts=1))


def test_whole_files_and_commands_that_fail(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(expected := os.urandom(SHARD_BYTES))
    assert fetch_bytes(f"pipe:cat {tmp_path}/shard", SHARD_BYTES) == expected
    with pytest.raises(
        UserError, match=r"pipe:cat .* cannot be fetched, after 1 attempts: the command ended with status 1"
    ):
        fetch_bytes("pipe:cat /nowhere 2>&-", 1, Patience(attempts=1))
