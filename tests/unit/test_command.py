"""How commands take their options from a signature, and how they end."""

import argparse
import errno
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from ecn_dist.command import add_options, command, verb
from ecn_dist.errors import UserError, printable, printable_lines
from ecn_dist.methods.options import Count, Positive


def ends(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    @command
    def main(argv: list[str] | None = None) -> int:
        raise error

    status = main([])
    return status, capsys.readouterr().err


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("memory.momentum: 2 is too much"), "memory.momentum: 2 is too much"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x.png"), "/data/x.png: No space left on device; free"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file or the output: No space left on device; free space"),
        (PermissionError(errno.EACCES, "Permission denied", b"/srv/x"), "/srv/x: Permission denied; correct its"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/tmp"), "/tmp: Is a directory; name a file"),
        (OSError(errno.EROFS, "Read-only file system", "/proc/x"), "/proc/x: Read-only file system; name a place"),
        (OSError("cannot seek"), "cannot seek"),
        (UnicodeDecodeError("utf-8", b"\xff\xfeh\x00", 0, 1, "invalid start byte"), r"b'\xff\xfeh\x00' is no UTF-8"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown = ends(error, capsys)
    assert status == 2
    assert shown.startswith("error: ")
    assert said in shown
    assert shown.count("\n") == 1


def test_ctrl_c_and_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError(), capsys)


def test_before_the_group_is_up_every_rank_tells_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        report = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
        status, shown = ends(UserError("device: 'cuda' was asked for"), capsys)
        assert (status, shown) == (2, f"error: rank {rank} on {socket.gethostname()}: device: 'cuda' was asked for\n")
        assert "'cuda' was asked for" in report.read_text()


def test_what_all_ranks_raise_is_told_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "error: too many\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert ends(UserError("too many", on_all_ranks=True), capsys) == (2, said)


def test_names_do_not_reach_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("übung\x1b]0;X\x07\n\udcff\u202e.jpg") == r"übung\x1b]0;X\x07\n\udcff\u202e.jpg"
    assert printable_lines("two:\n  a\x1b\nb") == "two:\n  a\\x1b\n  b"
    _, shown = ends(UserError("h/\x1b[2J.tar is missing"), capsys)
    assert shown == "error: h/\\x1b[2J.tar is missing\n"


@verb("draw", "example: ecn-dist draw x --size 3")
def draw(
    place: str,
    *,
    names: list[Path],
    kind: Literal["a", "b"] = "a",
    size: Count = 2,
    share: Positive | None = None,
    only: list[str] | None = None,
    quiet: bool = False,
) -> int:
    """Draw something.

    At 100 % of its size.

    Args:
        place: where
        names: of files,
            one or several
        kind: of picture
        size: in pixels
        share: of 100 %
        only: this one
        quiet: say nothing
    """
    print(place, names, kind, size, share, only, quiet)
    return 3


def test_options_of_a_signature(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(["x", "--names", "1", "null"]) == 3
    assert capsys.readouterr().out == f"x {[Path('1'), Path('null')]} a 2 None None False\n"
    assert draw(["--only", "p", "x", "--only=q", "--kind", "b", "--share", ".5", "--quiet", "--names", "a"]) == 3
    assert capsys.readouterr().out == f"x {[Path('a')]} b 2 0.5 ['p', 'q'] True\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["x"], "--names"),
        (["--names", "a"], "place"),
        (["x", "--names", "a", "--kind", "c"], "choose from"),
        (["x", "--names", "a", "--size", "0"], "'0' must be a whole number, at least 1"),
        (["x", "--names", "a", "--size", "1.5"], "'1.5' must be a whole number"),
        (["x", "--names", "a", "--share", "nan"], "'nan' must be a number, above 0"),
        (["x", "--names", "a", "--qui"], "--qui"),
    ],
)
def test_options_that_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        draw(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        draw(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for text in ("ecn-dist draw", "At 100 % of", "of files, one or several", "in pixels (default: 2)", "of 100 %"):
        assert text in shown
    assert "Args" not in shown
    assert "example: " in shown


def test_every_parameter_must_be_described() -> None:
    def undescribed(*, size: int = 1) -> int:
        """Do."""
        return size

    with pytest.raises(KeyError, match="size"):
        add_options(argparse.ArgumentParser(), undescribed)


def test_help_of_the_whole_is_quick() -> None:
    code = "import sys, ecn_dist.cli as c; s = c.main(['--help']); assert 'torch' not in sys.modules; sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "search" in done.stdout


def test_output_that_cannot_be_written() -> None:
    code = "import sys; from ecn_dist.command import command; sys.exit(command(lambda argv=None: print('x') or 0)())"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    said = "error: a file or the output: No space left on device; free space on its disk\n"
    assert done.stderr == said
