"""Files that are written whole or not at all. Imports only errors, so that every layer can use it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ecn_dist.errors import UserError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path`, and return it as a Path. What was there stays until all is written.

    A missing folder is made. What stands there and is no file (a device, a pipe) is written to as it is. Raises
    `UserError` where it cannot be written.
    """
    with atomic_file(path) as file:
        # Names of files may hold bytes of no encoding.
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes `path` at the end of the block; after an exception nothing changes.

    Until then it lies in the same folder under a new name of its own, so that nothing there is overwritten and no link
    is followed. Raises `UserError` as `write_atomically` does, for any `OSError` of the block.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
        file = unfinished.open("xb")  # never a file or link that is there
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or rights there, or name another") from error


def check_name(path: Path, suffix: str) -> None:
    """Raise `UserError` where `path` cannot become a file with this suffix; to be asked before the work is done."""
    if path.suffix != suffix:
        raise UserError(f"{path}: is written as {suffix}, and must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
