"""Joining the process group where torchrun's environment is wrong or the other ranks cannot be reached."""

import ctypes
import socket
import subprocess
import sys

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.errors import UserError

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "abc"}, "RANK is 'abc'.*whole number.*torchrun"),
        ({"RANK": "2"}, "RANK is '2'.*below WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set.*torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'.*65535"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
    ],
)
def test_wrong_environment(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], words: str) -> None:
    for name, value in (GOOD | changed).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.start(torch.device("cpu"), 1.0)
    assert not distributed.is_distributed()


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_out_of_reach(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Nobody listens for rank 1, and nobody comes to rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (GOOD | {"RANK": str(rank), "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    words = rf"rank {rank} on host {socket.gethostname()} .*127.0.0.1:{port} within 1 s.*timed out.*timeout_seconds"
    with pytest.raises(UserError, match=rf"(?is){words}"):
        distributed.start(torch.device("cpu"), 1.0)
    assert not distributed.is_distributed()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    """A large block that is freed and asked for again brings no new pages, which the kernel would have to clear."""
    code = """
import resource, torch
from ecn_dist import distributed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
distributed.start(torch.device("cpu"))
faults()
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert after < before / 5
