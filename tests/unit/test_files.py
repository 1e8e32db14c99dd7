"""Writing whole or not at all: what is there stays, nothing is left behind, no link is followed."""

import errno
import os
import secrets
import stat
from pathlib import Path

import pytest

from ecn_dist.errors import UserError
from ecn_dist.files import atomic_file, write_atomically


def test_text_and_bytes_get_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    assert write_atomically(path, "ä\n") == path
    assert path.read_bytes() == "ä\n".encode()
    write_atomically(path, "a \udcff\ud800")  # as in names of files that are no UTF-8
    assert path.read_bytes() == b"a \\udcff\\ud800"
    write_atomically(str(path), b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_what_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"half %d" % (1 // 0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No space left on device\); free space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("mine")
    path.symlink_to(victim)
    write_atomically(path, "new")
    assert (path.is_symlink(), path.read_text(), victim.read_text()) == (False, "new", "mine")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    trap = tmp_path / ".a.guessed"
    trap.symlink_to(victim)
    with pytest.raises(UserError, match="File exists"):
        write_atomically(path, "newer")
    assert victim.read_text() == "mine"
    assert trap.is_symlink()


def test_a_device_stays_a_device() -> None:
    write_atomically("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        write_atomically(tmp_path, "x")
