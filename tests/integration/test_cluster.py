"""Cluster memory over whole runs: the same on any ranks, continued to the bit, without the target's identities."""

import re
from pathlib import Path

import pytest
import torch

from ecn_dist import config as configuration
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.train import main
from ecn_dist.training.signals import EXIT_PREEMPTED
from tests.integration.conftest import REPOSITORY, Domains
from tests.integration.test_unlabelled_target import without_identities
from tests.integration.training import (
    SMALL_INPUT,
    THIN,
    assert_equal_runs,
    checkpoint_steps,
    final_tensors,
    loss_lines,
    train_on,
)
from tests.ranks import RankPool

CONFIG = str(REPOSITORY / "configs" / "demo_cluster.yaml")
# An epoch on the source alone, then two of 20 steps; 6 clusters of 4 pictures in a batch.
RECIPE = [
    *(
        "--global_batch_size",
        "24",
        "--optim.source_only_epochs",
        "1",
        "--epochs",
        "2",
        "--cluster.steps_per_epoch",
        "20",
    ),
    *("--cluster.camera_weight", "0.5", "--cluster.min_samples", "2", "--logging.every_steps", "1"),
    *("--logging.tensorboard", "false", "--logging.figures", "false", *SMALL_INPUT, *THIN),
]


@pytest.fixture
def options(small_domains: Domains) -> list[str]:
    return ["--config", CONFIG, *small_domains.options[2:], *RECIPE]


def losses(run: Path) -> torch.Tensor:
    names = ("loss", "loss_cluster", "loss_camera", "loss_source")
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line and line["epoch"] >= 0]
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("batchnorm", [(), ("--model.batchnorm", "group", "--model.batchnorm_group", "8")])
def test_float64_runs_are_equal(
    ranks: RankPool, options: list[str], batchnorm: tuple[str, ...], tmp_path: Path
) -> None:
    runs = {}
    for world_size in (1, 2) if batchnorm else (1, 3):
        runs[world_size] = tmp_path / f"ranks-{world_size}"
        slow = ["--optim.lr", "0.001", "--optim.backbone_lr", "0.001"]  # or rounding grows beyond 1e-6 in 60 steps
        argv = [*options, *batchnorm, *slow, "--precision", "fp64", "--output_dir", str(runs[world_size])]
        assert train_on(ranks, world_size, argv) == {0}
    expected, tensors = losses(runs[1]), final_tensors(runs[1])
    assert expected.shape == (40, 4)
    assert (expected > 0).all()
    assert (tensors["cluster.labels"] >= 0).sum() > 100
    for world_size, run in runs.items():
        torch.testing.assert_close(losses(run), expected, rtol=1e-6, atol=0)
        found = final_tensors(run)
        assert torch.equal(found["cluster.labels"], tensors["cluster.labels"]), world_size
        for rows in ("memory.rows", "proxies.rows"):
            torch.testing.assert_close(found[rows], tensors[rows], rtol=0, atol=1e-6)


@pytest.mark.timeout(600)
def test_continued_in_the_middle_of_an_epoch_to_the_bit(ranks: RankPool, options: list[str], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_on(ranks, 2, [*options, "--output_dir", str(whole)]) == {0}
    alone = len([line for line in read_metrics(whole / "metrics.jsonl") if line["epoch"] < 0])
    to_broken = [*options, "--output_dir", str(broken), "--data.workers", "1"]  # kept from epoch to epoch; no change
    assert train_on(ranks, 2, to_broken, stop_rank=1, stop_step=alone + 5) == {EXIT_PREEMPTED}
    assert alone < checkpoint_steps(broken)[-1] < alone + 20  # with the first clusters
    assert train_on(ranks, 2, to_broken) == {0}
    assert_equal_runs(broken, whole)


@pytest.mark.timeout(600)
def test_removing_the_pids_changes_no_parameter(small_domains: Domains, options: list[str], tmp_path: Path) -> None:
    unlabelled = ["--target", str(without_identities(small_domains.target, tmp_path / "unlabelled"))]
    assert main([*options, "--output_dir", str(tmp_path / "with")]) == 0
    assert main([*options, *unlabelled, "--output_dir", str(tmp_path / "without")]) == 0
    labelled, lines = loss_lines(tmp_path / "with"), loss_lines(tmp_path / "without")
    assert any("cluster_ami" in line for line in labelled)
    said = (tmp_path / "with" / "logs" / "rank-0.log").read_text()
    assert len(re.findall(r"epoch \d: clusters \d+  outliers \d+  .*cluster ami 0\.\d+", said)) == 2
    assert not any("cluster_ami" in line for line in lines)
    assert [line.get("loss") for line in lines] == [line.get("loss") for line in labelled]
    expected, found = final_tensors(tmp_path / "with"), final_tensors(tmp_path / "without")
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.timeout(300)
def test_clusters_that_grow_together_say_what_to_change(options: list[str], tmp_path: Path, capsys) -> None:
    assert main([*options, "--cluster.eps", "0.99", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "lower cluster.eps" in said
    assert "a batch takes 6 clusters" in said


def test_a_target_too_small_for_a_batch_of_clusters(options: list[str], tmp_path: Path, capsys) -> None:
    assert main([*options, "--cluster.min_samples", "60", "--output_dir", str(tmp_path / "run")]) == 2
    assert (
        "the target has 240 training pictures, and the clusters of a batch have at least 360" in capsys.readouterr().err
    )


def test_options_of_clusters_are_checked(capsys) -> None:
    places = ["--config", CONFIG, "--target", "t", "--output_dir", "o", "--optim.source_only_epochs", "0"]
    for options, text in (
        ([], "cluster.source_weight: 1.0 needs a labelled source"),
        (["--cluster.source_weight", "0", "--cluster.instances", "7"], "do not divide global_batch_size"),
        (["--cluster.source_weight", "0", "--cluster.eps", "1"], "cluster.eps: 1.0 must be above 0 and below 1"),
    ):
        config = configuration.parse([*places, *options], "test", "")
        with pytest.raises(configuration.UserError, match=text):
            config.check()
    configuration.parse([*places, "--cluster.source_weight", "0"], "test", "").check()
