"""Every shipped configuration, scaled down, does not depend on the number of ranks, and trains what it says it trains.

Only the command's options, its run folder and torchvision's names are used. A new file in configs/ is found by itself.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ecn_dist import config as configuration
from ecn_dist.config import Config
from ecn_dist.models import Backbone
from ecn_dist.reporting.run_reader import read_metrics
from tests.dataset_folders import pack_folder, write_market
from tests.integration.conftest import REPOSITORY
from tests.integration.training import train_on
from tests.ranks import RankPool

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
WITH_BOTTLENECKS = "market2duke"  # of ResNet-50's blocks, as it asks for; the others get ResNet-18's
SCALED = {
    "global_batch_size": 6,
    "data.streams": 6,
    "data.height": 32,
    "data.width": 16,
    "data.workers": 0,
    "model.embedding_dim": 32,
    "optim.lr": 0.01,  # from random weights, the papers' rates let rounding grow still faster
    "optim.backbone_lr": 0.001,
    "optim.source_only_epochs": 0,
    "epochs": 2,  # of two steps
    "checkpoint.every_steps": 1000,
    "logging.every_steps": 1,
    "logging.tensorboard": False,
    "logging.figures": False,
}
OF_METHOD = {
    "ecn": {"loss.neighbors_from_epoch": 1},
    "hhl": {"hhl.source_identities": 2, "hhl.instances": 3, "hhl.target_pictures": 6},
    "fmcl": {"loss.num_neighbors": 6, "loss.neighbors_from_epoch": 1, "fmcl.momentum_from_epoch": 1},
    "camstyle": {"camstyle.copies": 6},
    "cluster": {
        "cluster.instances": 3,
        "cluster.steps_per_epoch": 2,
        "cluster.eps": 0.6,
        "cluster.min_samples": 2,
        "cluster.k1_intra": 1,
        "cluster.k1_inter": 2,
        "optim.lr": 0.0001,  # Adam takes whole steps where a gradient is nothing but rounding
        "optim.backbone_lr": 0.0001,
    },
}
# What no shipped configuration has yet: groups that lie within a rank, and on 3 ranks across them.
OPTIONS = {
    "model.batchnorm": "group",
    "model.batchnorm_group": "3",
    "model.last_stride": "1",
    "model.pooling": "gem",
}
CASES = [pytest.param(file, {}, id=file.stem) for file in CONFIGS]
CASES += [pytest.param(file, OPTIONS, id="options") for file in CONFIGS if file.stem == "demo"]
STAGES = (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",))  # a ResNet's


class Tiny(NamedTuple):
    """A source and a target of 12 pictures with style copies, and a folder of starting weights by network."""

    source: Path
    target: Path
    weights: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    for domain in ("source", "target"):
        write_market(folder / "data" / domain, identities=2, splits=["train"])
        pack_folder(folder / "data" / domain, folder / domain, camera_style="histogram", min_shards=2)
    for arch in ("small_resnet", "thin_resnet18", "thin_resnet50"):
        torch.manual_seed(0)
        backbone = Backbone(arch, 32, 16).train()
        with torch.no_grad():
            for name, parameter in backbone.body.named_parameters():
                if name.endswith("bn3.weight"):  # or the random ResNet-50 makes 1e-3 of a rounding in three steps
                    parameter *= 0.1
            backbone(3 + torch.randn(8, 3, 32, 16))  # statistics other than 0 and 1
        torch.save(backbone.body.state_dict(), folder / f"{arch}.pth")
    return Tiny(folder / "source", folder / "target", folder)


def scaled_options(file: Path, tiny: Tiny, run: Path, **more: str) -> list[str]:
    config = load(["--config", str(file)])
    arch = config.model.arch
    if arch == "resnet50":
        arch = "thin_resnet50" if file.stem == WITH_BOTTLENECKS else "thin_resnet18"
    options = SCALED | OF_METHOD[config.method] | {"model.weights": tiny.weights / f"{arch}.pth", "model.arch": arch}
    if config.model.batchnorm == "group":
        options["model.batchnorm_group"] = 3
    options |= {"source": tiny.source, "target": tiny.target, "output_dir": run} | more
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["--config", str(file), *given]


def load(options: list[str]) -> Config:
    return configuration.parse(options, "test", "")


def train(ranks: RankPool, world_size: int, options: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses (steps, parts) of a run of the command, and the weights that it exports."""
    assert train_on(ranks, world_size, options) == {0}
    run = Path(load(options).output_dir)
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    losses = [[value or 0.0 for key, value in line.items() if key.startswith("loss")] for line in steps]
    return torch.tensor(losses, dtype=torch.float64), load_file(run / "weights.safetensors")


def check_what_moved(config: Config, weights: dict[str, Tensor]) -> None:
    """Frozen tensors are those of the starting weights, to the last bit, and all others of the backbone are not."""
    frozen = sum(STAGES[: config.model.frozen_stages], ())
    start = torch.load(config.model.weights, weights_only=True)
    for name, before in start.items():
        is_statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        trains_anyway = config.model.shortcut_batchnorm_trains and "downsample.1." in name and is_statistic
        stands_still = name.startswith(frozen) and not trains_anyway
        assert torch.equal(weights[name], before.to(weights[name].dtype)) == stands_still, name


@pytest.mark.parametrize(("file", "more"), CASES)
def test_float64_runs_are_equal(ranks: RankPool, tiny: Tiny, file: Path, more: dict, tmp_path: Path) -> None:
    expected = None
    for world_size in (1, 2, 3):
        options = scaled_options(file, tiny, tmp_path / str(world_size), precision="fp64", engine="ddp", **more)
        losses, weights = train(ranks, world_size, options)
        expected = losses if expected is None else expected
        assert losses.shape[0] == 4
        assert (losses[:, 0] > 0).all()
        assert (losses[1:] > 0).all()  # fmcl's bank is empty at first, and its loss 0
        torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0)
        check_what_moved(load(options), weights)


@pytest.mark.deepspeed
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_deepspeed_runs_are_close_over_three_steps(ranks: RankPool, tiny: Tiny, file: Path, tmp_path: Path) -> None:
    expected = None
    for world_size in (1, 2):
        # No neighbours: the choice of the k nearest leaps where float32 rounds two similarities into another order.
        choices = {"precision": "fp32", "engine": "deepspeed"}
        if load(["--config", str(file)]).method in ("ecn", "fmcl"):
            choices["loss.neighbors_from_epoch"] = "2"
        options = scaled_options(file, tiny, tmp_path / str(world_size), **choices)
        losses, weights = train(ranks, world_size, options)
        expected = losses if expected is None else expected
        torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-4, atol=0)
        check_what_moved(load(options), weights)
