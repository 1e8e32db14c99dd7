"""Runs for the tests of what people do with a trained model: random weights, as a run leaves them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ecn_dist.config import Config, DataConfig, ModelConfig, dump
from ecn_dist.methods.base import Step
from ecn_dist.models import export_weights
from tests.networks import source_network
from tests.tiny_shards import jpeg_bytes


def write_trained_run(folder: Path, *, precision: str = "fp32", seed: int = 0, summary: dict | None = None) -> Path:
    """config.yaml and weights.safetensors of a small network whose BatchNorms are not the identity."""
    folder.mkdir(parents=True)
    config = Config(
        source="/home/somebody/shards/source",
        target="/home/somebody/shards/target",
        output_dir=str(folder),
        precision=precision,
        data=DataConfig(height=64, width=32),
        model=ModelConfig(arch="small_resnet", weights="none", embedding_dim=16),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = source_network(num_identities=5)
        network.train()
        with torch.no_grad():
            network(
                {"source": 3 + torch.randn(8, 3, 64, 32)}, Step(0, 0, False)
            )  # running statistics other than 0 and 1
    (folder / "config.yaml").write_text(dump(config))
    export_weights(network, folder / "weights.safetensors")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Smooth random JPEGs of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"{n:03d}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(jpeg_bytes(rng, 40 + 9 * n, 20 + 5 * n))
    return paths


def turned(path: Path, output: Path) -> Path:
    """The picture stored on its side, with the EXIF orientation that sets it upright; without loss."""
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        picture.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(output, exif=exif)
    return output
