"""A continued run is the uninterrupted one: bitwise on the same ranks, to rounding on others."""

import json
from pathlib import Path

import pytest
import torch

from ecn_dist.evaluate import main as evaluate
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.training.checkpoint import read_meta
from ecn_dist.training.signals import EXIT_PREEMPTED
from tests.integration.conftest import Domains
from tests.integration.training import (
    SHORT,
    THIN,
    assert_equal_runs,
    checkpoint_steps,
    final_tensors,
    loss_lines,
    newest_step,
    train_on,
)


@pytest.mark.timeout(400)
def test_bitwise_on_the_same_ranks(ranks, small_domains: Domains, tmp_path: Path) -> None:
    # Three, as the sum of two numbers is the same in any order.
    options = [*small_domains.options, *SHORT, *THIN, "--evaluation.every_epochs", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_on(ranks, 3, [*options, "--output_dir", str(whole)]) == {0}
    assert checkpoint_steps(whole) == [20, 30]

    in_background = [*options, "--output_dir", str(broken), "--checkpoint.asynchronous", "true"]
    assert train_on(ranks, 3, in_background, stop_rank=2, stop_step=11) == {EXIT_PREEMPTED}
    stopped_at = checkpoint_steps(broken)[-1]
    assert 12 <= stopped_at < 30
    assert not (broken / "summary.json").exists()
    assert train_on(ranks, 3, in_background) == {0}
    assert_equal_runs(broken, whole)
    assert json.loads((broken / "summary.json").read_text())["steps"] == 30

    # Started once more, there is nothing to do, and nothing is done.
    before = (broken / "summary.json").read_bytes()
    assert train_on(ranks, 3, in_background) == {0}
    assert (broken / "summary.json").read_bytes() == before


@pytest.mark.timeout(400)
def test_on_other_ranks_to_rounding(ranks, small_domains: Domains, tmp_path: Path) -> None:
    """2 -> 3 -> 1 ranks by two interruptions, in float64."""
    slow = ["--optim.lr", "0.01", "--optim.backbone_lr", "0.01"]  # training makes rounding grow, the faster the steeper
    options = [*small_domains.options, *SHORT, *THIN, *slow, "--precision", "fp64", "--logging.every_steps", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_on(ranks, 2, [*options, "--output_dir", str(whole)]) == {0}
    to_broken = [*options, "--output_dir", str(broken)]
    assert train_on(ranks, 2, to_broken, stop_rank=0, stop_step=6) == {EXIT_PREEMPTED}
    assert train_on(ranks, 3, to_broken, stop_rank=1, stop_step=newest_step(broken) + 9) == {EXIT_PREEMPTED}
    assert newest_step(broken) < 28
    assert train_on(ranks, 1, to_broken) == {0}

    lines, expected = loss_lines(broken), loss_lines(whole)
    assert [line["step"] for line in lines] == list(range(30))
    for key in ("loss", "loss_source", "loss_target"):
        found = torch.tensor([line[key] or 0.0 for line in lines], dtype=torch.float64)
        wanted = torch.tensor([line[key] or 0.0 for line in expected], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    tensors, expected_tensors = final_tensors(broken), final_tensors(whole)
    torch.testing.assert_close(tensors["memory.rows"], expected_tensors["memory.rows"], rtol=1e-6, atol=1e-9)
    assert torch.equal(tensors["memory.written"], expected_tensors["memory.written"])
    for key in expected_tensors:
        if key.startswith(("network.", "optimizer.")):
            torch.testing.assert_close(tensors[key], expected_tensors[key], rtol=1e-6, atol=1e-8)


@pytest.mark.timeout(300)
def test_the_best_on_validation_people_is_kept_with_its_figures(
    ranks, small_domains: Domains, validation: Path, tmp_path: Path
) -> None:
    options = [*small_domains.options, *SHORT, *THIN, "--output_dir", str(tmp_path), "--epochs", "3"]
    keep = ["--checkpoint.keep", "1", "--checkpoint.keep_best", "true", "--checkpoint.keep_epochs", "[-1]"]
    assert train_on(ranks, 2, [*options, *keep, "--checkpoint.validation", str(validation)]) == {0}
    told = {line["step"] + 1: line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation_mAP" in line}
    assert list(told) == [10, 20, 30, 40]
    best = max(told, key=lambda step: told[step]["validation_mAP_stepwise"])
    assert checkpoint_steps(tmp_path) == sorted({10, best, 40})  # of the source-only epoch, and the newest
    newest = tmp_path / "checkpoints" / "step-00000040"
    figures = read_meta(newest)["validation"]

    # One rank's figures of the same weights: those of the validation people, and not of the target's.
    by_one = {}
    for name, data in (("validation", validation), ("target", small_domains.target)):
        output = tmp_path / f"{name}.json"
        places = ["--checkpoint", str(newest), "--data", str(data), "--output", str(output), "--workers", "0"]
        assert evaluate([*places, "--device", "cpu"]) == 0
        by_one[name] = json.loads(output.read_text())
    assert figures["mAP_stepwise"] == pytest.approx(by_one["validation"]["mAP_stepwise"], rel=1e-5)
    assert abs(figures["mAP_stepwise"] - by_one["target"]["mAP_stepwise"]) > 1e-3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == {
        "step": best,
        "validation": read_meta(newest.with_name(f"step-{best:08d}"))["validation"],
    }
    assert f"step-{best:08d} had the highest step-wise mAP on validation" in (tmp_path / "MODEL_CARD.md").read_text()


@pytest.mark.timeout(300)
def test_validation_changes_nothing_of_the_training(
    ranks, small_domains: Domains, validation: Path, tmp_path: Path
) -> None:
    """In the middle of epochs too, and with BatchNorm statistics of each rank's own."""
    options = [*small_domains.options, *SHORT, *THIN, "--checkpoint.every_steps", "7", "--model.batchnorm", "local"]
    plain, validated = tmp_path / "plain", tmp_path / "validated"
    assert train_on(ranks, 2, [*options, "--output_dir", str(plain)]) == {0}
    watched = [*options, "--output_dir", str(validated), "--checkpoint.validation", str(validation)]
    assert train_on(ranks, 2, watched) == {0}
    told = [line for line in loss_lines(validated) if "validation_mAP" not in line]
    assert [line["step"] + 1 for line in loss_lines(validated) if "validation_mAP" in line] == [7, 14, 21, 28]
    assert told == loss_lines(plain)
    assert (validated / "weights.safetensors").read_bytes() == (plain / "weights.safetensors").read_bytes()
