"""A folder of fetched shards and of the rows of their index, limited in bytes, that a host's processes may share.

A file is named by its content's checksum, and there whole or not at all: it is made as `*.part`, which has its final
length from the start, verified, synced, and renamed. One that is not what it should be is made anew, and no link is
followed. Locks (flock, which ends with its holder) keep order: one process makes a file, and who needs it waits; files
come and go under the folder's `lock`, so that the lengths in the folder are what is taken; a file that is made, read or
mapped is held by a shared lock, and not removed.

Several users share a folder in which each may write and remove (no sticky bit), with a umask that lets each write the
others' files: 002 with a common group, or 000.
"""

import fcntl
import hashlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from ecn_dist.data.fetch import PATIENCE, FetchError, Patience, fetch, shown
from ecn_dist.data.index import ShardInfo, SplitIndex
from ecn_dist.data.plan import Step
from ecn_dist.errors import UserError

FOLDER_VARIABLE, GIB_VARIABLE = "ECN_DIST_CACHE_DIR", "ECN_DIST_CACHE_GIB"
DEFAULT_GIB = "32"
WAIT_SECONDS = 0.05
AHEAD_SHARE = 4  # one part in so many of the cache is for what is fetched ahead, shared by the host's ranks
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
REMEDY = (
    f"Make room on the disk or lower {GIB_VARIABLE}; where several users share the folder, let each write it and the "
    f"others' files (a common group and umask 002, chmod -R g+rwX); or name another folder with {FOLDER_VARIABLE}"
)

Receive = Callable[[Iterator[bytes | memoryview]], None]


@dataclass
class ShardCache:
    """Fetched shards, and mapped rows. Its methods raise `UserError` where the folder is unusable, or has no room."""

    folder: Path  # on a disk of this host, or one that knows flock; made if need be
    limit_bytes: int  # kept at any time, shards being fetched included; the least recently used go first
    patience: Patience = PATIENCE  # with a slow or failing source, and with lack of room

    def __post_init__(self) -> None:
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_host(cls) -> "ShardCache":
        """That of `ECN_DIST_CACHE_DIR` (else `ecn_dist/shards` in the user's cache folder) and `ECN_DIST_CACHE_GIB`.

        By environment, since room on a disk is a matter of the host and not of a run.
        """
        gib = os.environ.get(GIB_VARIABLE, DEFAULT_GIB)
        try:
            limit_bytes = int(float(gib) * 2**30)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{GIB_VARIABLE} is {gib!r}; give a number of GiB, such as {DEFAULT_GIB}") from error
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(os.environ.get(FOLDER_VARIABLE) or users / "ecn_dist" / "shards"), limit_bytes)

    def mapped(self, split: SplitIndex) -> SplitIndex:
        """The split with its rows mapped from a file here, that stays while they are used: a worker maps them, too.

        Raises `UserError` where they do not fit with two of the largest shards, one in use and one on its way.
        """
        buffer = BytesIO()
        np.save(buffer, split.members, allow_pickle=False)
        data, largest = buffer.getbuffer(), max(shard.bytes for shard in split.shards)
        if (needed := 2 * largest + len(data)) > self.limit_bytes:
            raise UserError(
                f"the cache {self.folder} is limited to {self.limit_bytes} bytes, and shards are up to {largest} "
                f"bytes large: raise {GIB_VARIABLE} to at least {needed / 2**30:.3g}"
            )
        name = f"{hashlib.sha256(data).hexdigest()}.members.npy"
        descriptor = self._have(name, len(data), "the index", lambda receive: receive(iter([data])))
        members = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        weakref.finalize(members, os.close, descriptor)
        return replace(split, members=members)

    @contextmanager
    def open(self, url: str, shard: ShardInfo) -> Iterator[int]:
        """A descriptor of the shard's file, fetched first if need be, which stays while the block lasts.

        Raises `UserError` where the URL cannot be fetched, or is not the shard that was packed.
        """
        deliver = partial(fetch, url, patience=self.patience, limit=shard.bytes)
        descriptor = self._have(f"{shard.sha256}.tar", shard.bytes, shown(url), deliver)
        try:
            with self._told():
                yield descriptor
        finally:
            os.close(descriptor)

    def _have(self, name: str, size: int, what: str, deliver: Callable[[Receive], None]) -> int:
        """A descriptor of the file, by which it is held; `deliver` hands over its bytes where it is not here."""
        path = self.folder / name
        with self._told():
            if (found := _find(path, size)) is not None:
                return found
            with self._locked(f"{name[:2]}.lock"):  # one of 256, so that few wait for another file's
                if (found := _find(path, size)) is not None:
                    return found
                part = path.with_suffix(".part")
                descriptor = self._reserve(part, size, what)
                try:
                    deliver(lambda chunks: _write(chunks, descriptor, size, name[:64]))
                    os.fsync(descriptor)
                    with self._locked():
                        part.rename(path)
                except BaseException:
                    with self._locked():
                        part.unlink(missing_ok=True)
                    os.close(descriptor)
                    raise
                return descriptor

    def _reserve(self, part: Path, size: int, what: str) -> int:
        """A descriptor of a new file of so many bytes, by which it is held."""
        end = time.monotonic() + self.patience.attempts * self.patience.stall_seconds
        while True:
            with self._locked():
                part.unlink(missing_ok=True)  # left by a process that was killed
                if self._make_room(size):
                    descriptor = _open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    os.ftruncate(descriptor, size)
                    return descriptor
            if time.monotonic() > end:
                raise UserError(
                    f"no room for {what} ({size} bytes) in {self.folder}, which is limited to {self.limit_bytes} bytes "
                    f"that are in use: raise {GIB_VARIABLE}"
                )
            time.sleep(WAIT_SECONDS)

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used files that nobody holds until `needed` bytes are free."""
        status = {path: path.lstat() for path in self.folder.glob("?" * 64 + ".*")}  # checksums
        taken = sum(of_file.st_size for of_file in status.values())
        for path in sorted(status, key=lambda path: status[path].st_mtime_ns):
            if taken + needed <= self.limit_bytes:
                break
            descriptor = _open(path, os.O_RDONLY)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                taken -= status[path].st_size
            os.close(descriptor)
        return taken + needed <= self.limit_bytes

    @contextmanager
    def _locked(self, name: str = "lock") -> Iterator[None]:
        descriptor = _open(self.folder / name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of this host's disk as `UserError`, which tells them from those of the source."""
        try:
            yield
        except OSError as error:
            where = error.filename or self.folder
            raise UserError(f"shard cache {where}: {error.strerror}. {REMEDY}") from error


class FetchAhead:
    """A thread that walks the steps some way before the training does, and has the cache fetch what comes into use.

    It only saves time: what it could not fetch, the loader fetches, and reports. As many shards are fetched ahead as
    fit into this rank's share of the cache, and always one. Without a cache it does nothing.
    """

    def __init__(self, split: SplitIndex, cache: ShardCache | None, steps: Iterable[Step]) -> None:
        self._position = -1.0
        self._moved = threading.Condition()
        if cache:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun says
            shards = cache.limit_bytes // (AHEAD_SHARE * ranks * max(shard.bytes for shard in split.shards))
            once = replace(cache, patience=replace(cache.patience, attempts=1))
            threading.Thread(target=self._run, args=(split, once, steps, max(1, shards)), daemon=True).start()

    def reached(self, step: float) -> None:
        """The training is at `step`; at infinity the thread ends, after the shard it is at."""
        with self._moved:
            self._position = step
            self._moved.notify()

    def _run(self, split: SplitIndex, cache: ShardCache, steps: Iterable[Step], shards: int) -> None:
        shard_of_row = split.members["shard"]
        ahead: deque[int] = deque(maxlen=shards)  # the steps that the newest shards are for
        used_in: dict[int, int] = {}  # the newest pass that each shard was fetched for
        for step in steps:
            for shard in shard_of_row[step.rows_b].tolist():
                if used_in.get(shard) == step.pass_number:
                    continue
                used_in[shard] = step.pass_number
                with self._moved:
                    self._moved.wait_for(lambda: len(ahead) < shards or ahead[0] <= self._position)
                if self._position == float("inf"):
                    return
                ahead.append(step.number)
                with suppress(UserError), cache.open(split.shard_path(shard), split.shards[shard]):
                    pass


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | FLAGS, 0o666)  # less what the umask takes


def _find(path: Path, size: int) -> int | None:
    """A descriptor of the file, by which it is held; None where it is not there, was cut short or is another."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    # A shard was verified when it came; rows are looked at once a process.
    if status.st_nlink and status.st_size == size and (path.suffix == ".tar" or _sha256(descriptor) == path.name[:64]):
        with suppress(PermissionError):  # another user's: it keeps its place in the order
            os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    return None


def _sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(chunks: Iterator[bytes | memoryview], descriptor: int, size: int, sha256: str) -> None:
    """Write all chunks; `FetchError` where they are not the content that was announced."""
    checksum, position = hashlib.sha256(), 0
    for chunk in chunks:
        checksum.update(chunk)
        rest = memoryview(chunk)
        while rest:  # a disk that gets full takes a part of it first
            written = os.pwrite(descriptor, rest, position)
            rest, position = rest[written:], position + written
    if (position, found := checksum.hexdigest()) != (size, sha256):
        raise FetchError(f"{position} bytes, sha256 {found[:12]}..., where {size}, {sha256[:12]}..., were packed")
