"""Sound input, made once: a packed shard folder, two trained runs, a feature file, pictures of every format."""

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ecn_dist import embed, report, train
from ecn_dist.data import pictures
from ecn_dist.styles.networks import Generator, Shape, save_generator
from tests.dataset_folders import pack_folder, write_market
from tests.fuzz.harness import Place

HEIGHT, WIDTH = 32, 16
TINY = {
    "seed": 0, "epochs": 2, "global_batch_size": 4, "precision": "fp32", "device": "cpu",
    "data.height": HEIGHT, "data.width": WIDTH, "data.workers": 0, "data.streams": 2,
    "model.arch": "small_resnet", "model.weights": "none",
    "checkpoint.every_steps": 2, "checkpoint.keep": 1, "logging.tensorboard": "false", "logging.figures": "false",
}  # fmt: skip
METHODS: dict[str, dict[str, object]] = {
    "ecn": {"method": "ecn", "model.embedding_dim": 16, "loss.neighbors_from_epoch": 1, "loss.num_neighbors": 2},
    "cluster": {
        "method": "cluster", "cluster.instances": 2, "cluster.steps_per_epoch": 3, "cluster.k1": 4, "cluster.k2": 2,
        "cluster.min_samples": 2, "cluster.camera_weight": 0.5, "model.pooling": "gem", "checkpoint.keep_best": "true",
        "evaluation.every_epochs": 1,
    },
}  # fmt: skip


def pack_validation(folder: Path) -> None:
    """Pack `folder`/validation, by which method cluster's run chooses its best."""
    people = write_market(folder / "others", identities=2, cameras=2, splits=("query", "gallery"))
    pack_folder(people, folder / "validation")


def options(method: str, shards: Path, output: Path) -> list[str]:
    """The command line of a tiny training on one shard folder, which `pack_validation` was called beside."""
    given = TINY | METHODS[method] | {"source": shards, "target": shards, "output_dir": output}
    if "checkpoint.keep_best" in given:
        given["checkpoint.validation"] = shards.parent / "validation"
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Material:
    """Folders and files that no case changes."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def features(self) -> Path:
        return self.root / "gallery.safetensors"

    @property
    def generator(self) -> Path:
        return self.root / "generator.safetensors"

    def run(self, method: str) -> Path:
        return self.root / method

    @property
    def pictures(self) -> list[Path]:
        """One of each format."""
        return sorted((self.root / "formats").iterdir())

    def copy(self, source: Path, place: Place) -> None:
        """All of `source` into the case's input folder, where it may be changed."""
        shutil.copytree(source, place.input, dirs_exist_ok=True)


def make(root: Path) -> Material:
    """All of it below `root`."""
    material = Material(root)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        market = write_market(root / "market", identities=3, cameras=2)
        pack_folder(market, material.shards, camera_style="histogram", min_shards=2)
        pack_validation(root)
        for method in METHODS:
            status = train.main(options(method, material.shards, material.run(method)))
            assert status == 0, f"training {method} ended with {status}"
        crops = market / "query"
        common = ["--checkpoint", str(material.run("ecn")), "--input", str(crops), "--device", "cpu"]
        assert embed.main([*common, "--output", str(material.features)]) == 0
        assert report.main(["--run", str(material.run("ecn"))]) == 0
    save_generator(Generator(Shape(("c1", "c2"), 8, 8, channels=4, blocks=1)), material.generator)
    _write_formats(root / "formats")
    return material


def _write_formats(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for kind in pictures.FORMATS:
        image.save(folder / f"rgb.{kind.lower()}", format=kind)
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.jpeg")
    image.convert("CMYK").save(folder / "cmyk.jpeg")
    image.save(folder / "progressive.jpeg", progressive=True)
    exif = image.getexif()
    exif[pictures.EXIF_ORIENTATION] = 6
    image.save(folder / "turned.jpeg", exif=exif)
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "wide.png")
