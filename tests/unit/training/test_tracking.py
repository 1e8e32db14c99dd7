"""What is told of a run where a disk fails."""

import errno
import io
import logging
from pathlib import Path

import pytest

from ecn_dist.errors import UserError
from ecn_dist.reporting.run_reader import METRICS, read_metrics
from ecn_dist.training.tracking import SummaryWriter, Tracker, log, start_logs


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def new_tracker(folder: Path, *, first_step: int = 0, tensorboard: bool = False) -> Tracker:
    return Tracker(folder, first_step=first_step, total_steps=10, tensorboard=tensorboard)


def test_a_full_disk_under_tensorboard_ends_its_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ecn_dist.training.tracking.log.warning", lambda text, *args: said.append(text % args))
    tracker = new_tracker(tmp_path, tensorboard=True)
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    for step in range(2):
        tracker.metrics({"step": step, "epoch": 0, "loss": 1.0})
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [0, 1]
    assert ["TensorBoard's record ends here" in text for text in said] == [True]


def test_a_full_disk_under_the_log_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        write = full  # type: ignore[assignment]

    before = log.handlers, log.level, log.propagate, logging.raiseExceptions
    log.handlers = []
    try:
        start_logs(tmp_path)
        to_file = log.handlers[0]
        assert isinstance(to_file, logging.FileHandler)
        to_file.setStream(Full()).close()  # type: ignore[union-attr]
        log.warning("a note")
        said = capsys.readouterr()
    finally:
        log.handlers, log.level, log.propagate, logging.raiseExceptions = before
    assert (said.out, said.err) == ("a note\n", "")


def test_a_full_disk_under_the_metrics_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = new_tracker(tmp_path)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*No space left") as raised:
        tracker.metrics({"step": 0, "epoch": 0})
    assert raised.value.on_all_ranks


def test_a_continued_record_drops_only_what_comes_again(tmp_path: Path) -> None:
    lines = ['{"step": 0}', '{"step": 5}', '{"step": 6}', '{"st']
    (tmp_path / METRICS).write_text("\n".join(lines))
    new_tracker(tmp_path, first_step=6)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [0, 5]
    broken = "\n".join([lines[0], lines[3], lines[1]])
    (tmp_path / METRICS).write_text(broken)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        new_tracker(tmp_path, first_step=6)
    assert (tmp_path / METRICS).read_text() == broken
