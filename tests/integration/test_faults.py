"""Ranks that are killed, that hang, and that raise, under a real torchrun."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from ecn_dist.distributed import EXIT_RANK_LOST
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.training.checkpoint import CheckpointStore
from tests.integration.conftest import Domains
from tests.integration.faults import RunningTrain, train_with_kills
from tests.integration.training import SHORT, assert_equal_runs, train_on

OFTEN = ["--logging.every_steps", "1", "--checkpoint.every_steps", "2"]


@pytest.mark.timeout(400)
def test_killed_ranks_come_back(ranks, small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT, *OFTEN]
    assert train_on(ranks, 2, [*options, "--output_dir", str(tmp_path / "whole")]) == {0}
    broken = [*options, "--output_dir", str(tmp_path / "broken")]
    train_with_kills(broken, ranks=2, kills=2, total_steps=30, seed=0)
    assert_equal_runs(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.timeout(3000)
@pytest.mark.skipif("ECN_FAULTS" not in os.environ, reason="twenty kills take minutes: make test-faults")
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_twenty_kills(ranks, small_domains: Domains, tmp_path: Path, asynchronous: str) -> None:
    options = [*small_domains.options, *SHORT, *OFTEN, "--epochs", "8", "--checkpoint.asynchronous", asynchronous]
    assert train_on(ranks, 2, [*options, "--output_dir", str(tmp_path / "whole")]) == {0}
    broken = [*options, "--output_dir", str(tmp_path / "broken")]
    train_with_kills(broken, ranks=2, kills=20, total_steps=90, seed=len(asynchronous))
    assert_equal_runs(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.timeout(300)
def test_a_rank_that_stops_is_named_within_the_time_out(small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT, *OFTEN, "--output_dir", str(tmp_path), "--timeout_seconds", "10"]
    with RunningTrain([*options, "--epochs", "12"], ranks=3) as training:
        training.wait_for_step(4)
        first, stopped, third = training.workers()
        os.kill(stopped, signal.SIGSTOP)
        at = time.monotonic()
        while Path(f"/proc/{first}").exists() and Path(f"/proc/{third}").exists():
            assert time.monotonic() - at < 60
            time.sleep(0.05)
        # The time-out, some seconds in which silence is heard, and the time of a busy machine.
        assert time.monotonic() - at < 10 + 40
        os.kill(stopped, signal.SIGKILL)
        status, output = training.finish()
    assert status != 0
    assert f"exitcode  : {EXIT_RANK_LOST}" in output
    shown = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(shown) == 1
    # By its collective's error, or on a busy machine by the silence before that.
    assert re.match(r"error: rank 0 (could not finish|gave up waiting in) ", shown[0]), shown[0]
    assert "no heartbeat comes any more from rank 1 on host" in shown[0]
    assert " at step " in shown[0]
    assert "rank 1" in (tmp_path / "logs" / "rank-2.log").read_text()


@pytest.mark.timeout(300)
def test_the_bug_of_one_rank_is_shown_once(small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT, *OFTEN, "--output_dir", str(tmp_path)]
    bug = ("tests.integration.misbehave", "raise", "1", "13")
    with RunningTrain(options, ranks=2, module=bug) as training:
        status, output = training.finish()
    assert status != 0
    assert output.count('raise ZeroDivisionError("a bug of one rank")') == 1
    assert output.count("error: ") == 1
    assert "rank 1 on host" in output[output.index("error: ") :]
    assert "Traceback" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert "Traceback" not in (tmp_path / "logs" / "rank-0.log").read_text()
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == "step-00000012"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12
