"""Shards behind URLs: patience with the source, and a cache that is bounded and never half written."""

import errno
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch import Patience
from ecn_dist.data.index import ShardInfo, SplitIndex
from ecn_dist.errors import UserError
from tests.http_server import FolderServer
from tests.unit.data.conftest import SHARD_BYTES

IMPATIENT = Patience(attempts=3, stall_seconds=0.5, backoff_seconds=0.02)


def content(cache: ShardCache, url: str, shard: ShardInfo) -> bytes:
    with cache.open(f"{url}/{shard.name}", shard) as descriptor:
        return os.pread(descriptor, 2 * SHARD_BYTES, 0)


def mapped(cache: ShardCache, rows: np.ndarray) -> np.ndarray:
    return cache.mapped(SplitIndex("train", "", (ShardInfo("a", 1, SHARD_BYTES // 4, ""),), rows, 1, ())).members


def files(folder: Path) -> list[Path]:
    """All but the locks."""
    return [path for path in folder.iterdir() if path.stat().st_size]


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
        (404, "HTTP Error 404: Not Found"),
        ("stall", "nothing arrived for 0.5 s"),
        ("short", "the connection broke off"),
        ("wrong", "sha256 .* were packed"),
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
    split = SplitIndex("train", "", tuple(shards), np.arange(10), 1, ())
    with pytest.raises(UserError, match=r"limited to 10737 bytes, .* raise ECN_DIST_CACHE_GIB to at least"):
        cache.mapped(split)
    ShardCache(tmp_path / "disk", 2 * SHARD_BYTES + 208).mapped(split)
    with pytest.raises(UserError, match=r"limited to 100207 bytes"):
        ShardCache(tmp_path / "disk", 2 * SHARD_BYTES + 207).mapped(split)
    monkeypatch.setenv("ECN_DIST_CACHE_GIB", "much")
    with pytest.raises(UserError, match="ECN_DIST_CACHE_GIB is 'much'; give a number"):
        ShardCache.of_host()
    monkeypatch.setenv("ECN_DIST_CACHE_GIB", "1")
    monkeypatch.setenv("ECN_DIST_CACHE_DIR", f"{tmp_path}/shards/{shards[0].name}/below")
    with pytest.raises(UserError, match=r"below: Not a directory\. .*name another folder with ECN_DIST_CACHE_DIR"):
        ShardCache.of_host()


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
    cache = ShardCache(tmp_path / "cache", 2 * SHARD_BYTES, Patience(attempts=1, stall_seconds=0.5))
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
    assert {path.name for path in files(cache.folder)} == {f"{shards[0].sha256}.tar", f"{shards[2].sha256}.tar"}


def test_rows_are_counted_and_removed_like_shards_but_not_while_they_are_mapped(
    server: FolderServer, shards: list[ShardInfo], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES, IMPATIENT)
    rows = np.arange(SHARD_BYTES // 8 - 100)
    own = mapped(cache, rows)
    again = mapped(ShardCache(cache.folder, cache.limit_bytes, IMPATIENT), rows)
    (file,) = cache.folder.glob("*.members.npy")
    del own
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
    assert np.array_equal(mapped(cache, rows), rows)  # which removes a shard
    assert taken(cache.folder) <= cache.limit_bytes
    cache.patience = Patience(attempts=1, stall_seconds=0.1)
    holders = [cache.open(f"{server.url}/{shard.name}", shard) for shard in shards[:3]]
    with (
        holders[0],
        holders[1],
        holders[2],
        pytest.raises(UserError, match=r"no room for the index \(\d+ bytes\)"),
    ):
        mapped(cache, rows + 1)


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
        UserError, match=rf"shard cache {cache.folder}: No space left on device\. .*ECN_DIST_CACHE_GIB"
    ) as caught:
        content(cache, server.url, shards[0])
    assert "cannot be fetched" not in str(caught.value)
    assert server.requests[shards[0].name] == 1  # another attempt would not help
    assert taken(cache.folder) == 0
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert content(cache, server.url, shards[0])


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
    mapped(cache, rows)
    (file,) = cache.folder.glob("*.members.npy")
    if isinstance(data, bytes):
        file.write_bytes(data)
    else:
        np.save(file, rows[:50] if data == "shorter" else rows + 1)
    assert np.array_equal(mapped(cache, rows), rows)


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
