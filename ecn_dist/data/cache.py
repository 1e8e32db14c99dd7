"""A folder of fetched shards and of the rows that tell their members, limited in bytes, that the processes of a host
may share.

A file is named by its content's checksum, and there whole or not at all: it is made under the name `*.part`, verified,
synced, and renamed. One that is not what it should be all the same is made anew, and no link is followed. Locks (flock,
which ends with its holder) keep order:

- exclusive on a `.part` by the one that makes it; who needs the same file waits for that lock;
- shared on a file while it is read or mapped, so that it is not removed to make room;
- exclusive on the folder's `lock` while files come and go: a `.part` has its final length from the start, so the
  lengths in the folder are what is taken.

Several users share a folder in which each may write and remove (no sticky bit), with a umask that lets each write the
others' files: 002 with a common group, or 000.
"""

import errno
import fcntl
import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np

from ecn_dist.data.fetch import FetchError, Patience, fetch, shown
from ecn_dist.data.index import ShardInfo
from ecn_dist.errors import UserError

FOLDER_VARIABLE, GIB_VARIABLE = "ECN_DIST_CACHE_DIR", "ECN_DIST_CACHE_GIB"
DEFAULT_GIB = "32"
WAIT_SECONDS = 0.05
KEPT = ("*.tar", "*.members.npy", "*.part")
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
FILE_MODE = 0o666  # less what the umask takes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class ShardCache:
    """Fetched shards, and mapped rows.

    Args:
        folder: on a disk of this host, or one that knows flock; made if need be.
        limit_bytes: kept at any time, shards being fetched included. The least recently used go first.
        patience: with a slow or failing source; also how long to wait for room.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience: Patience | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.patience = patience or Patience()
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_host(cls) -> "ShardCache":
        """The cache that the environment describes, since room on a disk is a matter of the host and not of a run.

        `ECN_DIST_CACHE_DIR` (else `ecn_dist/shards` in the user's cache folder) and `ECN_DIST_CACHE_GIB` (else 32).
        """
        gib = os.environ.get(GIB_VARIABLE, DEFAULT_GIB)
        try:
            limit_bytes = int(float(gib) * 2**30)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{GIB_VARIABLE} is {gib!r}; give a number of GiB, such as {DEFAULT_GIB}") from error
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(os.environ.get(FOLDER_VARIABLE) or users / "ecn_dist" / "shards"), limit_bytes)

    def check_room(self, shards: Sequence[ShardInfo], members_bytes: int = 0) -> None:
        """`UserError` unless the rows and two of the largest of `shards` fit: one in use, and one on its way."""
        largest = max(shard.bytes for shard in shards)
        needed = 2 * largest + members_bytes
        if needed > self.limit_bytes:
            raise UserError(
                f"the cache {self.folder} is limited to {self.limit_bytes} bytes, and shards are up to {largest} "
                f"bytes large: raise {GIB_VARIABLE} to at least {needed / 2**30:.3g}"
            )

    @contextmanager
    def open(self, url: str, shard: ShardInfo) -> Iterator[int]:
        """A descriptor of the shard's file, fetched first if need be, which stays while the block lasts.

        Raises:
            UserError: the URL cannot be fetched, is not the shard that was packed, or finds no room; the folder may not
                be written, or its disk is full.
        """
        path = self.folder / f"{shard.sha256}.tar"
        with self._told():
            while (descriptor := _open_shared(path)) is None or os.fstat(descriptor).st_size != shard.bytes:
                _discard(path, descriptor)  # cut short, as by a disk that failed
                self.fetch(url, shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def fetch(self, url: str, shard: ShardInfo, patience: Patience | None = None) -> None:
        """Have the shard here; at once if it is. Errors as for `open`."""

        def receive(descriptor: int) -> None:
            fetch(url, lambda chunks: _receive(chunks, shard, descriptor), patience or self.patience, shard.bytes)

        self._make(self.folder / f"{shard.sha256}.tar", shard.bytes, shown(url), receive)

    def map_members(self, members: np.ndarray) -> np.ndarray:
        """The same rows, memory-mapped from a file here: pickled to a worker, they are mapped again and not copied.

        The file stays while the returned array does.

        Raises:
            UserError: there is no room; the folder may not be written, or its disk is full.
        """
        buffer = BytesIO()
        np.save(buffer, members, allow_pickle=False)
        data = buffer.getbuffer()
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.folder / f"{sha256}.members.npy"
        with self._told():
            while (descriptor := _open_shared(path)) is None or _sha256(descriptor) != sha256:
                _discard(path, descriptor)
                self._make(path, len(data), "the index", lambda part: _write(part, data, 0))
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        weakref.finalize(mapped, os.close, descriptor)
        return mapped

    def _make(self, path: Path, size: int, what: str, write: Callable[[int], None]) -> None:
        """Have the file here: what `write` writes to a descriptor, or what another process made meanwhile."""
        part, waited = path.with_suffix(".part"), 0.0
        with self._told():
            while not _touch(path):
                with ExitStack() as opened:
                    with self._locked():
                        descriptor = _create(part)
                        opened.callback(os.close, descriptor)
                        own = _try_lock(descriptor)
                        reserved = own and self._reserve(path, part, descriptor, size)
                    if reserved:
                        self._fill(path, part, descriptor, write)
                    elif not own:
                        fcntl.flock(descriptor, fcntl.LOCK_SH)  # until it has made the file, or failed to
                    elif not path.exists():
                        if waited > self.patience.attempts * self.patience.stall_seconds:
                            raise UserError(
                                f"no room for {what} ({size} bytes) in {self.folder}, which is limited to "
                                f"{self.limit_bytes} bytes that are in use: raise {GIB_VARIABLE}"
                            )
                        time.sleep(WAIT_SECONDS)
                        waited += WAIT_SECONDS

    def _reserve(self, path: Path, part: Path, descriptor: int, size: int) -> bool:
        """Whether the `.part`, which is removed otherwise, has its full length; under the folder's lock."""
        os.ftruncate(descriptor, 0)
        if path.exists() or not self._make_room(size):
            part.unlink()
            return False
        os.ftruncate(descriptor, size)
        return True

    def _fill(self, path: Path, part: Path, descriptor: int, write: Callable[[int], None]) -> None:
        try:
            write(descriptor)
            os.fsync(descriptor)
            with self._locked():
                part.rename(path)
        except BaseException:
            with self._locked():
                part.unlink()
            raise

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used files that nobody holds until `needed` bytes are free."""
        files = []
        for path in chain.from_iterable(map(self.folder.glob, KEPT)):
            status = path.lstat()
            files.append((status.st_mtime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + needed <= self.limit_bytes:
                break
            descriptor = os.open(path, os.O_RDONLY | FLAGS)
            if _try_lock(descriptor):
                path.unlink()
                taken -= size
            os.close(descriptor)
        return taken + needed <= self.limit_bytes

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = _create(self.folder / "lock")
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
            problem = f"{error.filename or self.folder}: {error.strerror}"
            if error.errno in DISK_FULL:
                problem = f"{self.folder}: the disk is full"
                remedy = f"Free some of it, lower {GIB_VARIABLE} to what it has room for"
            elif error.errno in DENIED:
                remedy = (
                    "Where several users share it, each needs the right to write the folder and the others' files "
                    "(a common group and umask 002, and chmod -R g+rwX for what is there)"
                )
            else:
                remedy = "Check the path and the disk"
            raise UserError(f"shard cache {problem}. {remedy}, or name another with {FOLDER_VARIABLE}") from error


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, FILE_MODE)


def _open_shared(path: Path) -> int | None:
    """A descriptor that keeps the file from being removed; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | FLAGS)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _touch(path)
    return descriptor


def _discard(path: Path, descriptor: int | None) -> None:
    """Remove a file that is not what it should be, if there is one."""
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _touch(path: Path) -> bool:
    """Whether the file is here; it then is the last to be removed."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:
        pass  # another user's: it can be read all the same, and only its place in the order stays
    return True


def _receive(chunks: Iterator[bytes], shard: ShardInfo, descriptor: int) -> None:
    checksum, position = hashlib.sha256(), 0
    for chunk in chunks:
        checksum.update(chunk)
        _write(descriptor, chunk, position)
        position += len(chunk)
    if position != shard.bytes:
        raise FetchError(f"{position} of {shard.bytes} bytes")
    if checksum.hexdigest() != shard.sha256:
        raise FetchError(f"sha256 {checksum.hexdigest()[:12]}... where {shard.sha256[:12]}... was packed")


def _write(descriptor: int, chunk: bytes | memoryview, position: int) -> None:
    """All of `chunk`: a disk that gets full takes a part of it first."""
    rest = memoryview(chunk)
    while rest:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written


def _sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
