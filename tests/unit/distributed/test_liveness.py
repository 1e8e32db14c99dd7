"""What the report on a lost rank shows: its words, and no name from data raw on the terminal."""

from pathlib import Path

import pytest

from ecn_dist.distributed.liveness import report

TEXT = "rank 1 ended in step 3: UserError: \x1b]0;OWNED\x07\x1b[2J.tar is missing\nerror: forged"


def test_names_do_not_reach_the_terminal_raw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report(TEXT, to_console=True)
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"error: rank 1 ended in step 3: UserError: \x1b]0;OWNED\x07\x1b[2J.tar is missing"
    assert second == "  error: forged"  # indented: a part of the one message
    told = (tmp_path / "error.json").read_text()  # torchrun shows it on its own terminal
    assert r"\u001b" not in told
    assert r"\\x1b[2J.tar" in told
