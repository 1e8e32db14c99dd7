"""A folder of fetched shards, limited in bytes, that the processes of a host may share.

A file is named by the shard's checksum, so another packing never takes its place, and it is there whole or not at all:
it is fetched under the name `*.part`, verified, and renamed. Locks (flock, which ends with its holder) keep order:

- exclusive on a `.part` by the one that fetches it; who needs the same shard waits for that lock and finds it fetched;
- shared on a `.tar` while it is read, so that it is not removed to make room;
- exclusive on the folder's `lock` while files come and go: a `.part` has its final length from the start, so the
  lengths in the folder are what is taken.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ecn_dist.data.fetch import FetchError, Patience, fetch
from ecn_dist.data.index import ShardInfo
from ecn_dist.errors import UserError

FOLDER_VARIABLE, GIB_VARIABLE = "ECN_DIST_CACHE_DIR", "ECN_DIST_CACHE_GIB"
DEFAULT_GIB = "32"
WAIT_SECONDS = 0.05
LOCK_NAME = "lock"


class ShardCache:
    """Fetched shards.

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"shard cache {self.folder}: {error.strerror}; name another with {FOLDER_VARIABLE}"
            ) from error

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

    def check_room(self, shards: Sequence[ShardInfo]) -> None:
        """`UserError` unless two of the largest of `shards` fit: one in use, and one on its way."""
        needed = 2 * max(shard.bytes for shard in shards)
        if needed > self.limit_bytes:
            raise UserError(
                f"the cache {self.folder} is limited to {self.limit_bytes} bytes, and shards are up to {needed // 2} "
                f"bytes large: raise {GIB_VARIABLE} to at least {needed / 2**30:.3g}"
            )

    @contextmanager
    def open(self, url: str, shard: ShardInfo) -> Iterator[int]:
        """A descriptor of the shard's file, fetched first if need be, which stays while the block lasts.

        Raises:
            UserError: the URL cannot be fetched, is not the shard that was packed, or finds no room.
        """
        path = self._path(shard, "tar")
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                break
            except FileNotFoundError:
                self.fetch(url, shard)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def fetch(self, url: str, shard: ShardInfo, patience: Patience | None = None) -> None:
        """Have the shard here; at once if it is. Errors as for `open`."""
        while not self._touch(shard):
            descriptor = self._reserve(url, shard)
            if descriptor is None:
                continue  # another process fetched it, or failed to
            part = self._path(shard, "part")
            try:
                self._receive(url, shard, descriptor, patience or self.patience)
                with self._locked():
                    part.rename(self._path(shard, "tar"))
            except BaseException:
                with self._locked():
                    part.unlink()
                raise
            finally:
                os.close(descriptor)

    def map_members(self, members: np.ndarray) -> np.ndarray:
        """The same rows, memory-mapped from a file here: pickled to a worker, they are mapped again and not copied."""
        path = self.folder / f"{hashlib.sha256(members.tobytes()).hexdigest()}.members.npy"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            with unfinished.open("wb") as file:
                np.save(file, members, allow_pickle=False)
            unfinished.rename(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _touch(self, shard: ShardInfo) -> bool:
        """Whether the shard is here; it then is the last to be removed."""
        with suppress(FileNotFoundError):
            os.utime(self._path(shard, "tar"))
            return True
        return False

    def _path(self, shard: ShardInfo, suffix: str) -> Path:
        return self.folder / f"{shard.sha256}.{suffix}"

    def _reserve(self, url: str, shard: ShardInfo) -> int | None:
        """The locked, empty `.part` of full length; None after waiting for another process that fetches it."""
        end = time.monotonic() + self.patience.attempts * self.patience.stall_seconds
        path = self._path(shard, "part")
        while True:
            with self._locked():
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if not _try_lock(descriptor):
                    break
                if self._path(shard, "tar").exists():
                    path.unlink()
                    os.close(descriptor)
                    return None
                os.ftruncate(descriptor, 0)
                if self._make_room(shard.bytes):
                    os.ftruncate(descriptor, shard.bytes)
                    return descriptor
                path.unlink()
                os.close(descriptor)
            if time.monotonic() > end:
                raise UserError(
                    f"no room for {url} ({shard.bytes} bytes) in {self.folder}, which is limited to {self.limit_bytes} "
                    f"bytes that are in use: raise {GIB_VARIABLE}"
                )
            time.sleep(WAIT_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.close(descriptor)
        return None

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used files that nobody holds until `needed` bytes are free."""
        files = []
        for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + needed <= self.limit_bytes:
                break
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if _try_lock(descriptor):
                path.unlink()
                taken -= size
            os.close(descriptor)
        return taken + needed <= self.limit_bytes

    def _receive(self, url: str, shard: ShardInfo, descriptor: int, patience: Patience) -> None:
        def write(chunks: Iterator[bytes]) -> None:
            checksum, position = hashlib.sha256(), 0
            for chunk in chunks:
                if position + len(chunk) > shard.bytes:
                    raise FetchError(f"more than the {shard.bytes} bytes that were packed")
                checksum.update(chunk)
                position += os.pwrite(descriptor, chunk, position)
            if position != shard.bytes:
                raise FetchError(f"{position} of {shard.bytes} bytes")
            if checksum.hexdigest() != shard.sha256:
                raise FetchError(f"sha256 {checksum.hexdigest()[:12]}... where {shard.sha256[:12]}... was packed")

        fetch(url, write, patience)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
