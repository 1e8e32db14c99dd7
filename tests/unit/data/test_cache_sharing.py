"""One cache for the processes and users of a host, some of whom may mean harm."""

import fcntl
import hashlib
import multiprocessing
import os
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch import Patience
from ecn_dist.data.index import ShardInfo
from ecn_dist.errors import UserError
from tests.http_server import FolderServer
from tests.unit.data.conftest import SHARD_BYTES
from tests.unit.data.test_cache import IMPATIENT, content, mapped, taken


def read_often(folder: str, limit_bytes: int, url: str, shards: list[ShardInfo], seed: int) -> None:
    cache = ShardCache(Path(folder), limit_bytes, Patience(stall_seconds=10.0))
    for number in np.random.default_rng(seed).integers(0, len(shards), 20):
        assert hashlib.sha256(content(cache, url, shards[number])).hexdigest() == shards[number].sha256


def test_many_processes_and_threads_may_share_it(server: FolderServer, shards: list[ShardInfo], tmp_path: Path) -> None:
    folder, limit_bytes = tmp_path / "cache", 3 * SHARD_BYTES
    folder.mkdir()
    largest, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        # Under the cache's own lock, under which sizes change: else what goes and what comes during a look count both.
        with (folder / "lock").open("w") as lock:
            while not ended.is_set():
                fcntl.flock(lock, fcntl.LOCK_EX)
                largest = max(largest, taken(folder))
                fcntl.flock(lock, fcntl.LOCK_UN)

    watcher = threading.Thread(target=watch)
    watcher.start()
    context = multiprocessing.get_context("fork")
    url = f"pipe:cat {tmp_path}/shards"
    processes = [
        context.Process(target=read_often, args=(str(folder), limit_bytes, url, shards, seed)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended.set()
    watcher.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < largest <= limit_bytes


def test_a_shard_wanted_by_many_is_fetched_once(server: FolderServer, shards: list[ShardInfo], tmp_path: Path) -> None:
    caches = [ShardCache(tmp_path / "cache", 10 * SHARD_BYTES) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        data = list(pool.map(lambda cache: content(cache, server.url, shards[5]), caches))
    assert len(set(data)) == 1
    assert server.requests[shards[5].name] == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_allows(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        cache = ShardCache(tmp_path / "cache", 10 * SHARD_BYTES, IMPATIENT)
        content(cache, server.url, shards[0])
        mapped(cache, np.arange(10))
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in cache.folder.iterdir()}
    assert modes == {".tar": mode, ".npy": mode, ".lock": mode, "": mode}


NOBODY = 65534


def as_another_user(folder: Path, url: str, shards: list[ShardInfo], results: Any) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        cache = ShardCache(folder, 2 * SHARD_BYTES, IMPATIENT)
        results.put([hashlib.sha256(content(cache, url, shard)).hexdigest() for shard in shards])
    except UserError as error:
        results.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_share_a_cache_or_are_told_what_keeps_them_out(server: FolderServer, shards: list[ShardInfo]) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def other_user(*wanted: ShardInfo) -> Any:
        process = context.Process(target=as_another_user, args=(folder, server.url, wanted, results))
        process.start()
        process.join()
        assert process.exitcode == 0
        return results.get()

    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        for umask in (0o000, 0o022):
            folder = Path(outer) / f"{umask:03o}"
            before = os.umask(umask)
            try:
                cache = ShardCache(folder, 2 * SHARD_BYTES, IMPATIENT)
                content(cache, server.url, shards[0])
                content(cache, server.url, shards[1])
            finally:
                os.umask(before)
            assert other_user(*shards[:2]) == [shard.sha256 for shard in shards[:2]]  # what is there can be read
            told = other_user(shards[2])
            if umask:
                assert re.match(rf"shard cache {folder}/..\.lock: Permission denied\. ", told)
                assert "umask 002" in told
                assert "ECN_DIST_CACHE_DIR" in told
            else:
                assert told == [shards[2].sha256]
        (folder / f"{shards[0].sha256}.tar").chmod(0o600)
        assert other_user(shards[0]).startswith(f"shard cache {folder}/{shards[0].sha256}.tar: Permission denied. ")


@pytest.mark.parametrize("name", ["{sha256}.tar", "{lock}.lock", "lock"])
def test_no_link_in_a_shared_folder_is_followed(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    (cache.folder / name.format(sha256=shards[0].sha256, lock=shards[0].sha256[:2])).symlink_to(victim)
    with pytest.raises(UserError, match=r"shard cache .*Too many levels of symbolic links"):
        content(cache, server.url, shards[0])
    assert victim.read_bytes() == b"precious"


def test_a_link_in_place_of_what_is_being_made_is_replaced(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    (cache.folder / f"{shards[0].sha256}.part").symlink_to(victim)
    assert hashlib.sha256(content(cache, server.url, shards[0])).hexdigest() == shards[0].sha256
    assert victim.read_bytes() == b"precious"


def test_rows_follow_no_link_either(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    rows = np.arange(100)
    mapped(cache, rows)
    (file,) = cache.folder.glob("*.members.npy")
    file.unlink()
    file.symlink_to(victim)
    with pytest.raises(UserError, match=r"shard cache .*Too many levels of symbolic links"):
        mapped(cache, rows)
    assert victim.read_bytes() == b"precious"
