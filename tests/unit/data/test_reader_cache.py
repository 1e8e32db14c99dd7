"""Shards behind URLs: patience with the source, and a cache that is bounded, shared and never half written."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch import Patience, fetch_bytes
from ecn_dist.data.index import ShardInfo
from ecn_dist.errors import UserError
from tests.http_server import FolderServer

IMPATIENT = Patience(attempts=3, stall_seconds=0.5, backoff_seconds=0.02)
SHARD_BYTES = 50_000


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    folder = tmp_path / "shards"
    folder.mkdir()
    infos = []
    for number in range(6):
        data = np.random.default_rng(number).bytes(SHARD_BYTES)
        (folder / f"train-{number:06d}.tar").write_bytes(data)
        infos.append(ShardInfo(f"train-{number:06d}.tar", 1, len(data), hashlib.sha256(data).hexdigest()))
    return infos


@pytest.fixture
def server(tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FolderServer(tmp_path / "shards")
    yield server
    server.stop()


def content(cache: ShardCache, url: str, shard: ShardInfo) -> bytes:
    with cache.open(f"{url}/{shard.name}", shard) as descriptor:
        return os.pread(descriptor, 2 * SHARD_BYTES, 0)


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("faults", [[404, 404], [503], ["stall"], ["short", "wrong"], [500, "stall"]])
def test_a_source_that_fails_at_first_is_tried_again(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, faults: list[int | str]
) -> None:
    server.faults[shards[0].name] = list(faults)
    data = content(ShardCache(tmp_path / "cache", 10 * SHARD_BYTES, IMPATIENT), server.url, shards[0])
    assert hashlib.sha256(data).hexdigest() == shards[0].sha256
    assert server.requests[shards[0].name] == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (404, "the server answered with an error"),
        ("stall", "nothing arrived for 0.5 s"),
        ("short", "the connection broke off"),
        ("wrong", "sha256 .* was packed"),
    ],
)
def test_a_source_that_keeps_failing_is_an_error_naming_it(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, fault: int | str, reason: str
) -> None:
    server.faults[shards[1].name] = [fault] * 9
    cache = ShardCache(tmp_path / "cache", 10 * SHARD_BYTES, IMPATIENT)
    with pytest.raises(
        UserError, match=rf"{server.url}/{shards[1].name} cannot be fetched, after 3 attempts: .*{reason}"
    ):
        content(cache, server.url, shards[1])
    assert server.requests[shards[1].name] == 3
    assert taken(cache.folder) == 0  # nothing half written stays


def test_folder_and_limit_come_from_the_environment(
    tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ECN_DIST_CACHE_DIR", raising=False)
    monkeypatch.delenv("ECN_DIST_CACHE_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = ShardCache.of_host()
    assert (cache.folder, cache.limit_bytes) == (tmp_path / "home" / "ecn_dist" / "shards", 32 * 2**30)
    monkeypatch.setenv("ECN_DIST_CACHE_DIR", str(tmp_path / "disk"))
    monkeypatch.setenv("ECN_DIST_CACHE_GIB", "0.00001")
    cache = ShardCache.of_host()
    assert (cache.folder, cache.limit_bytes) == (tmp_path / "disk", 10737)
    with pytest.raises(UserError, match=r"limited to 50000 bytes"):
        ShardCache(tmp_path / "disk", 50_000).check_room([ShardInfo("a", 1, 20_000, "")], members_bytes=10_001)
    with pytest.raises(UserError, match=r"limited to 10737 bytes, .* raise ECN_DIST_CACHE_GIB to at least"):
        cache.check_room(shards)
    monkeypatch.setenv("ECN_DIST_CACHE_GIB", "much")
    with pytest.raises(UserError, match="ECN_DIST_CACHE_GIB is 'much'; give a number"):
        ShardCache.of_host()
    monkeypatch.setenv("ECN_DIST_CACHE_GIB", "1")
    monkeypatch.setenv("ECN_DIST_CACHE_DIR", f"{tmp_path}/shards/{shards[0].name}/below")
    with pytest.raises(UserError, match=r"below: Not a directory\. .*name another with ECN_DIST_CACHE_DIR"):
        ShardCache.of_host()


def test_pipes_and_whole_files(server: FolderServer, shards: list[ShardInfo], tmp_path: Path) -> None:
    expected = (tmp_path / "shards" / shards[2].name).read_bytes()
    assert fetch_bytes(f"{server.url}/{shards[2].name}", SHARD_BYTES) == expected
    assert fetch_bytes(f"pipe:cat {tmp_path}/shards/{shards[2].name}", SHARD_BYTES) == expected
    with pytest.raises(
        UserError, match=r"pipe:cat .* cannot be fetched, after 1 attempts: the command ended with status 1"
    ):
        fetch_bytes("pipe:cat /nowhere 2>&-", 1, Patience(attempts=1))


def test_the_least_recently_used_go_first_and_the_limit_holds(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    for number in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        content(cache, server.url, shards[number])
        assert taken(cache.folder) <= cache.limit_bytes
        time.sleep(0.01)  # coarser than the clock of the file system
    for number in (0, 2, 3):
        content(cache, server.url, shards[number])
    assert server.requests == {shard.name: 1 for shard in shards[:4]}
    content(cache, server.url, shards[1])
    assert server.requests[shards[1].name] == 2


def test_a_shard_in_use_is_not_removed(server: FolderServer, shards: list[ShardInfo], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SHARD_BYTES, IMPATIENT)
    with cache.open(f"{server.url}/{shards[0].name}", shards[0]):
        content(cache, server.url, shards[1])
        content(cache, server.url, shards[2])
        content(cache, server.url, shards[0])
        with (
            cache.open(f"{server.url}/{shards[3].name}", shards[3]),
            pytest.raises(UserError, match=r"no room for .*train-000004.tar .* raise ECN_DIST_CACHE_GIB"),
        ):
            content(cache, server.url, shards[4])
    assert server.requests[shards[0].name] == 1
    content(cache, server.url, shards[4])


def test_what_a_killed_process_left_is_taken_over_or_removed(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SHARD_BYTES, IMPATIENT)
    for shard in shards[:2]:
        (cache.folder / f"{shard.sha256}.part").write_bytes(b"?" * SHARD_BYTES)
    assert hashlib.sha256(content(cache, server.url, shards[0])).hexdigest() == shards[0].sha256
    content(cache, server.url, shards[2])
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(
        [f"{shards[0].sha256}.tar", f"{shards[2].sha256}.tar", "lock"]
    )


def read_often(folder: str, limit_bytes: int, url: str, shards: list[ShardInfo], seed: int) -> None:
    cache = ShardCache(Path(folder), limit_bytes, Patience(stall_seconds=10.0))
    for number in np.random.default_rng(seed).integers(0, len(shards), 40):
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


def test_rows_are_counted_and_removed_like_shards_but_not_while_they_are_mapped(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    rows = np.arange(SHARD_BYTES // 8 - 100)
    mapped = cache.map_members(rows)
    again = ShardCache(cache.folder, cache.limit_bytes, IMPATIENT).map_members(rows)
    (file,) = cache.folder.glob("*.members.npy")
    del mapped
    for number in range(4):
        content(cache, server.url, shards[number])
        assert taken(cache.folder) <= cache.limit_bytes
        assert file.exists()
    assert len(list(cache.folder.glob("*.tar"))) == 2
    assert np.array_equal(again, rows)
    del again
    content(cache, server.url, shards[4])
    assert not file.exists()
    assert len(list(cache.folder.glob("*.tar"))) == 3
    assert np.array_equal(cache.map_members(rows), rows)  # which removes a shard
    assert taken(cache.folder) <= cache.limit_bytes
    cache.limit_bytes = SHARD_BYTES // 2
    cache.patience = Patience(attempts=1, stall_seconds=0.1)
    with pytest.raises(UserError, match=r"no room for the index \(\d+ bytes\)"):
        cache.map_members(rows + 1)


@pytest.mark.parametrize("takes_a_part", [False, True])
def test_a_full_disk_is_not_taken_for_a_failing_source(
    server: FolderServer,
    shards: list[ShardInfo],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    takes_a_part: bool,
) -> None:
    pwrite, room = os.pwrite, 20_000

    def limited(descriptor: int, data: bytes, position: int) -> int:
        if position + len(data) <= room:
            return pwrite(descriptor, data, position)
        if takes_a_part and position < room:
            return pwrite(descriptor, data[: room - position], position)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", limited)
    cache = ShardCache(tmp_path / "cache", 10 * SHARD_BYTES, IMPATIENT)
    with pytest.raises(
        UserError, match=rf"shard cache {cache.folder}: the disk is full\. .*ECN_DIST_CACHE_GIB"
    ) as caught:
        content(cache, server.url, shards[0])
    assert "cannot be fetched" not in str(caught.value)
    assert server.requests[shards[0].name] == 1  # another attempt would not help
    assert taken(cache.folder) == 0
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert content(cache, server.url, shards[0])


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_allows(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        cache = ShardCache(tmp_path / "cache", 10 * SHARD_BYTES, IMPATIENT)
        content(cache, server.url, shards[0])
        cache.map_members(np.arange(10))
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in cache.folder.iterdir()}
    assert modes == {".tar": mode, ".npy": mode, "": mode}


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
                assert told.startswith(f"shard cache {folder}/lock: Permission denied. ")
                assert "umask 002" in told
                assert "ECN_DIST_CACHE_DIR" in told
            else:
                assert told == [shards[2].sha256]
        (folder / f"{shards[0].sha256}.tar").chmod(0o600)
        assert other_user(shards[0]).startswith(f"shard cache {folder}/{shards[0].sha256}.tar: Permission denied. ")


@pytest.mark.parametrize("length", [0, SHARD_BYTES // 2, SHARD_BYTES + 1])
def test_a_cached_shard_of_another_size_is_fetched_anew(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, length: int
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    content(cache, server.url, shards[0])
    os.truncate(cache.folder / f"{shards[0].sha256}.tar", length)
    assert hashlib.sha256(content(cache, server.url, shards[0])).hexdigest() == shards[0].sha256
    assert server.requests[shards[0].name] == 2


@pytest.mark.parametrize("data", [b"", b"PK\3\4", "shorter", "other rows"])
def test_cached_rows_that_are_not_those_are_written_anew(tmp_path: Path, data: bytes | str) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    rows = np.arange(100)
    cache.map_members(rows)
    (file,) = cache.folder.glob("*.members.npy")
    if isinstance(data, bytes):
        file.write_bytes(data)
    else:
        np.save(file, rows[:50] if data == "shorter" else rows + 1)
    assert np.array_equal(cache.map_members(rows), rows)


@pytest.mark.parametrize("name", ["{sha256}.part", "{sha256}.tar", "lock"])
def test_no_link_in_a_shared_folder_is_followed(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    (cache.folder / name.format(sha256=shards[0].sha256)).symlink_to(victim)
    with pytest.raises(UserError, match=r"shard cache .*Too many levels of symbolic links"):
        content(cache, server.url, shards[0])
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("suffix", ["members.npy", "members.part"])
def test_rows_follow_no_link_either(tmp_path: Path, suffix: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    rows = np.arange(100)
    cache.map_members(rows)
    (file,) = cache.folder.glob("*.members.npy")
    file.unlink()
    file.with_name(file.name.replace("members.npy", suffix)).symlink_to(victim)
    with pytest.raises(UserError, match=r"shard cache .*Too many levels of symbolic links"):
        cache.map_members(rows)
    assert victim.read_bytes() == b"precious"


def test_what_is_renamed_is_on_the_disk(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, any(cache.folder.glob("*.tar"))))

    monkeypatch.setattr(os, "fsync", noted)
    content(cache, server.url, shards[0])
    assert synced == [(SHARD_BYTES, False)]
