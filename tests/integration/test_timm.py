"""Networks of timm through a whole run: train, freeze, evaluate, export; equal on any number of ranks."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecn_dist import export
from ecn_dist.models import Backbone, load_backbone
from ecn_dist.reporting.run_reader import read_metrics
from tests.dataset_folders import pack_folder, write_market
from tests.integration.training import train
from tests.ranks import RankPool

pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps -r requirements-extras.txt")

OPTIONS = {
    "method": "source_only",
    "global_batch_size": 6,
    "data.streams": 6,
    "data.height": 64,
    "data.width": 32,
    "data.workers": 0,
    "model.embedding_dim": 16,
    "model.mean": [0.5, 0.5, 0.5],
    "model.std": [0.5, 0.5, 0.5],
    "model.frozen_stages": 2,
    "optim.lr": 0.01,
    "optim.backbone_lr": 0.001,
    "optim.layer_decay": 0.7,
    "epochs": 1,
    "checkpoint.every_steps": 1000,
    "logging.every_steps": 1,
    "logging.tensorboard": False,
    "logging.figures": False,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    write_market(folder / "market", identities=2)
    pack_folder(folder / "market", folder / "shards", min_shards=2)
    return folder / "shards"


def weights_of(arch: str, folder: Path) -> Path:
    """A file of starting weights for another input, with statistics other than 0 and 1."""
    torch.manual_seed(0)
    backbone = Backbone(arch, 224, 224).train()
    with torch.no_grad():
        backbone(torch.randn(2, 3, 224, 224))
    torch.save(backbone.body.state_dict(), folder / "start.pth")
    return folder / "start.pth"


def train_small(argv: list[str]) -> int:
    """On a rank: the small networks are known there too."""
    importlib.import_module("tests.small_timm")
    return train(argv)


def run(ranks: RankPool, world_size: int, shards: Path, folder: Path, **options: object) -> Path:
    given = OPTIONS | {"source": shards, "target": shards, "output_dir": folder} | options
    argv = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    assert set(ranks(world_size).run(train_small, argv, timeout=600.0)) == {0}
    return folder


@pytest.mark.parametrize("name", ["ecn_vit+ics+parts", "ecn_swin", "ecn_convnext", "ecn_resnet"])
def test_small_networks_are_equal_on_any_number_of_ranks(
    ranks: RankPool, shards: Path, name: str, tmp_path: Path
) -> None:
    importlib.import_module("tests.small_timm")
    file = weights_of(f"timm/{name}", tmp_path)
    options = {"model.arch": f"timm/{name}", "model.weights": file, "precision": "fp64"}
    one, two = (run(ranks, size, shards, tmp_path / str(size), **options) for size in (1, 2))
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line] for folder in (one, two)
    ]
    assert len(losses[0]) == 2
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    found, wanted = (load_file(folder / "weights.safetensors") for folder in (two, one))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    start = Backbone(f"timm/{name}", 64, 32)
    load_backbone(start, str(file))
    frozen = [part for stage in start.stages[:2] for part in stage]
    for parameter, before in start.body.named_parameters():
        stands_still = any(f"{parameter}.".startswith(f"{part}.") for part in frozen)
        if stands_still or parameter.endswith("weight"):
            assert torch.equal(wanted[parameter], before.double()) == stands_still, parameter
    summaries = [json.loads((folder / "summary.json").read_text())["evaluation"] for folder in (one, two)]
    assert summaries[0]["mAP"] == pytest.approx(summaries[1]["mAP"], abs=1e-9)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "convnext_tiny", "resnet18"])
def test_networks_of_timm_train_evaluate_and_are_exported(
    ranks: RankPool, shards: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs the extra `export` ({package})")
    options = {"model.arch": f"timm/{name}", "model.weights": "none", "model.frozen_stages": 0}
    folder = run(ranks, 2, shards, tmp_path / "run", **options)
    assert json.loads((folder / "summary.json").read_text())["evaluation"]["mAP"] > 0
    output = tmp_path / "model.onnx"
    assert export.main(["--checkpoint", str(folder), "--format", "onnx", "--output", str(output)]) == 0, capsys
    import onnx

    (about,) = (entry.value for entry in onnx.load(str(output)).metadata_props if entry.key == "ecn_dist")
    assert json.loads(about)["input"]["mean"] == [0.5, 0.5, 0.5]
    assert "minus the mean (0.5, 0.5, 0.5)" in (tmp_path / "MODEL_CARD.md").read_text()
