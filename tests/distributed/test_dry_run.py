"""The plan's network traffic against what ranks hand to the collectives in a real step."""

from pathlib import Path

import pytest

from ecn_dist import distributed
from ecn_dist.checks.dry_run import make_plan
from ecn_dist.config import parse
from ecn_dist.distributed import count_traffic
from ecn_dist.training.building import build_trainer, open_domains
from tests.dataset_folders import pack_folder, write_market
from tests.ranks import RankPool

FLAGS = 64  # bytes of the step's yes-or-no questions (is a batch bad, is the step skipped, ...), which no plan lists


def step_matches_the_plan(options: list[str], folder: str) -> None:
    config = parse(options, "test", "")
    device = distributed.resolve_device("cpu")
    trainer = build_trainer(config, open_domains(config), device, Path(folder))
    at = trainer.timeline.at(0)
    trainer.strategy.begin_phase(at.source_only)
    trainer.feeder.begin_epoch(at)
    batches, _ = trainer.feeder.next(at)
    trainer.method.train()
    with count_traffic() as traffic:
        trainer.train_step(batches, at)
    planned: dict[str, int] = {}
    for transfer in make_plan(config, distributed.world_size()).transfers:
        if transfer.what != "gradients":  # these go through DistributedDataParallel
            planned[transfer.operation] = planned.get(transfer.operation, 0) + transfer.payload
    for operation in planned | traffic:
        payload = planned.get(operation, 0)
        assert payload <= traffic[operation] <= payload + FLAGS, operation


HHL = ["--hhl.source_identities=4", "--hhl.instances=3", "--hhl.target_pictures=12"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        # Neighbours from the first epoch on, so that the step has all that the plan counts.
        ("ecn", ["--loss.neighbors_from_epoch=0"]),
        ("ecn", ["--loss.neighbors_from_epoch=0", "--model.batchnorm=local"]),
        ("fmcl", ["--loss.neighbors_from_epoch=0"]),
        ("hhl", HHL),
        ("hhl", [*HHL, "--data.camera_style=false"]),
        ("camstyle", ["--camstyle.copies=12", "--data.camera_style=false"]),
    ],
    ids=["ecn", "ecn-local", "fmcl", "hhl", "hhl-real", "camstyle"],
)
def test_step_sends_what_the_plan_says(ranks: RankPool, tmp_path: Path, method: str, more: list[str]) -> None:
    for domain, styles in (("source", "none"), ("target", "histogram")):
        pack_folder(write_market(tmp_path / f"{domain}-data", identities=6), tmp_path / domain, camera_style=styles)
    options = [f"--{key}={tmp_path / key}" for key in ("source", "target")]
    options += [f"--output_dir={tmp_path / 'run'}", "--device=cpu", "--epochs=2", "--global_batch_size=12"]
    options += ["--data.height=64", "--data.width=32", "--data.streams=12", "--data.workers=0"]
    options += ["--model.arch=small_resnet", "--model.weights=none", "--model.embedding_dim=32"]
    options += [f"--method={method}", "--logging.tensorboard=false", *more]
    ranks(2).run(step_matches_the_plan, options, str(tmp_path / "run"))
