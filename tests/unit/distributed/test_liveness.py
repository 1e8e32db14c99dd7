"""What the report on a lost rank shows: its words, the true cause, and no name from data raw on the terminal."""

import json
import queue
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist

from ecn_dist.distributed import liveness
from ecn_dist.distributed.liveness import Beat, Heartbeats, report

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


class Store:
    """One that answers for a while only; the last news of rank 0 comes some rounds earlier."""

    def __init__(self, *, news: int, answers: int) -> None:
        self.news, self.answers, self.rounds = news, answers, 0

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    def set(self, key: str, value: str) -> None:
        self.rounds += 1
        if self.rounds > self.answers:
            raise RuntimeError("no answer")

    def check(self, keys: list[str]) -> bool:
        return keys == ["beat-0"]

    def get(self, key: str) -> str:
        return json.dumps(asdict(Beat(min(self.rounds, self.news), "running", "step 5", 7, "a", "05:50:18")))


def test_a_store_out_of_reach_is_the_cause_also_where_the_next_rank_was_silent_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(liveness, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "STORE_SECONDS", 0.3)
    monkeypatch.setattr(liveness, "exit_at_once", lambda status: None)
    monkeypatch.setattr(liveness, "report", lambda error, to_console: told.put(error))
    Heartbeats(cast(dist.Store, Store(news=3, answers=5)), 1, 2, timeout_seconds=1.0)
    said = told.get(timeout=60)
    assert "the store at" in said
    assert "rank 0 on host a, last heard of at 05:50:18" in said
