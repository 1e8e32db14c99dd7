"""A scheduler's signal: saved at the next step, and continued."""

import os
import signal
from pathlib import Path

import pytest

from tests.integration.conftest import Domains
from tests.integration.faults import RunningTrain
from tests.integration.training import SHORT, assert_equal_runs, checkpoint_steps, train_on

LOGGED = ["--logging.every_steps", "1"]


@pytest.mark.timeout(400)
def test_torchrun_is_terminated(ranks, small_domains: Domains, tmp_path: Path) -> None:
    """SIGTERM to torchrun, which passes it on to its workers; loader workers live on until the save is done."""
    options = [*small_domains.options, *SHORT, *LOGGED]
    assert train_on(ranks, 2, [*options, "--output_dir", str(tmp_path / "whole")]) == {0}
    broken = [*options, "--output_dir", str(tmp_path / "broken")]
    with RunningTrain([*broken, "--data.workers", "1"], ranks=2) as training:
        training.wait_for_step(12)
        os.kill(training.process.pid, signal.SIGTERM)
        _, output = training.finish()
    stopped_at = checkpoint_steps(tmp_path / "broken")[-1]
    assert 13 <= stopped_at < 30
    assert f"saved at step {stopped_at}" in output
    assert "error: " not in output
    assert train_on(ranks, 2, broken) == {0}
    assert_equal_runs(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.timeout(400)
def test_one_rank_is_told(small_domains: Domains, tmp_path: Path) -> None:
    options = [*small_domains.options, *SHORT, *LOGGED, "--epochs", "12", "--output_dir", str(tmp_path)]
    with RunningTrain(options, ranks=2) as training:
        training.wait_for_step(3)
        os.kill(training.workers()[1], signal.SIGUSR1)
        status, output = training.finish()
    assert status == 1  # torchrun's own
    assert "exitcode  : 75" in output
    assert f"saved at step {checkpoint_steps(tmp_path)[-1]}" in output
