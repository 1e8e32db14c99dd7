"""World size is a detail: the trainer on 1, 2, 3 and 4 ranks gives the same losses and the same memory."""

from pathlib import Path

import pytest
import torch

from ecn_dist.data import ShardIndex
from ecn_dist.distributed import load_sharded
from ecn_dist.reporting.run_reader import read_metrics
from tests.integration.conftest import Domains
from tests.integration.training import SMALL_INPUT, THIN, train_on
from tests.ranks import RankPool

NUM_EXEMPLARS, DIM = 240, 256
# Ten steps an epoch: one on the source alone, then the first 30 steps with the target loss, neighbours in 20 of them.
RECIPE = [
    *SMALL_INPUT,
    *THIN,
    "--optim.source_only_epochs",
    "1",
    "--loss.neighbors_from_epoch",
    "1",
    "--logging.every_steps",
    "1",
]
QUIET = ["--logging.tensorboard", "false", "--logging.figures", "false"]


def train(ranks: RankPool, domains: Domains, folder: Path, world_size: int, *options: str) -> Path:
    run = folder / f"ranks-{world_size}"
    argv = [*domains.options, "--output_dir", str(run), *RECIPE, *QUIET, *options]
    assert train_on(ranks, world_size, argv) == {0}
    return run


def losses(run: Path) -> torch.Tensor:
    """(steps, 3): total, source, target; the target's is 0 in source-only steps."""
    keys = ("loss", "loss_source", "loss_target")
    return torch.tensor(
        [[line[key] or 0.0 for key in keys] for line in read_metrics(run / "metrics.jsonl")], dtype=torch.float64
    )


def memory_rows(run: Path) -> torch.Tensor:
    rows = torch.zeros(NUM_EXEMPLARS, DIM, dtype=torch.float64)
    newest = max((run / "checkpoints").glob("step-*"))
    load_sharded({"memory.rows": rows}, newest)
    return rows


@pytest.mark.timeout(1500)
def test_float64_runs_are_equal(ranks: RankPool, small_domains: Domains, tmp_path: Path) -> None:
    # Training makes rounding grow, the faster the steeper: at three times this rate threefold a step, from 1e-14 to
    # 4e-7 in 27 steps, where one unit of a ReLU (1.8e-7 on one rank, -5.0e-8 on two) is cut off on one side only.
    options = ["--precision", "fp64", "--epochs", "3", "--optim.lr", "0.01", "--optim.backbone_lr", "0.01"]
    one = train(ranks, small_domains, tmp_path, 1, *options)
    expected, expected_rows = losses(one), memory_rows(one)
    assert expected.shape == (40, 3)
    assert (expected[10:, 2] > 0).all()
    # 30 steps of 24 pictures are three passes over the 240 target pictures: every picture was drawn.
    assert len(ShardIndex.load(str(small_domains.target)).split("train")) == NUM_EXEMPLARS
    assert (expected_rows.norm(dim=1) > 0.999).all()
    for world_size in (2, 3, 4):
        run = train(ranks, small_domains, tmp_path, world_size, *options)
        torch.testing.assert_close(losses(run), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(memory_rows(run), expected_rows, rtol=0, atol=1e-6)


@pytest.mark.timeout(900)
def test_float32_runs_are_close_over_three_steps(ranks: RankPool, small_domains: Domains, tmp_path: Path) -> None:
    options = ["--epochs", "1", "--optim.source_only_epochs", "0"]
    first_three = [losses(train(ranks, small_domains, tmp_path, world_size, *options))[:3] for world_size in (1, 2, 3)]
    for other in first_three[1:]:
        torch.testing.assert_close(other, first_three[0], rtol=1e-4, atol=0)
