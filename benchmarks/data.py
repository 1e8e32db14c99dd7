"""The data path on one core: from the bytes of JPEGs to batches, and what it costs beside bare decoding.

Pictures and style copies are drawn, written as loose files in the Market-1501 layout, and packed. On all sides the same
number of pictures is read, from the system's page cache. Time is this process's processor time, on one thread: figures
are pictures/s of one core.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import time

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks import harness
from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.stream import TrainStream
from ecn_dist.packing.layouts import read_dataset
from ecn_dist.packing.shards import pack
from ecn_dist.packing.styles import find_styles

STORED = (128, 64)
INPUT = (256, 128)
STREAMS = 16
PEOPLE = 8


def draw_picture(rng: np.random.Generator) -> bytes:
    """A smooth picture with the noise of a camera: about 4 kB, as pictures of the published data sets are."""
    height, width = STORED
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    data = BytesIO()
    Image.fromarray(noisy).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_loose_files(folder: Path, pictures: int, cameras: int) -> None:
    """`pictures` training pictures, each with a copy in the style of every other camera, in the Market-1501 layout."""
    rng = np.random.default_rng(0)
    train, copies = folder / "bounding_box_train", folder / "bounding_box_train_camstyle"
    for part in (train, copies, folder / "query", folder / "bounding_box_test"):
        part.mkdir(parents=True)
    for number in range(pictures):
        camera = number % cameras + 1
        stem = f"{number % PEOPLE + 1:04d}_c{camera}s1_{number:06d}_00"
        (train / f"{stem}.jpg").write_bytes(draw_picture(rng))
        for other in range(1, cameras + 1):
            if other != camera:
                (copies / f"{stem}_fake_{camera}to{other}.jpg").write_bytes(draw_picture(rng))
    for split, camera in (("query", 1), ("bounding_box_test", 2)):
        (folder / split / f"0001_c{camera}s1_000000_00.jpg").write_bytes(draw_picture(rng))


class LooseFiles(Dataset[Tensor]):
    """The usual way: one file and one transform of torchvision after the other."""

    def __init__(self, folder: Path) -> None:
        self.real = sorted((folder / "bounding_box_train").iterdir())
        self.copies = folder / "bounding_box_train_camstyle"
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(INPUT, scale=(0.64, 1.0), ratio=(1 / 3, 1 / 2)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
                v2.RandomErasing(0.5, scale=(0.02, 0.2)),
            ]
        )

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, at: int) -> Tensor:
        path = self.real[at]
        of_picture = [path, *self.copies.glob(f"{path.stem}_fake_*")]
        return self.transform(Image.open(random.choice(of_picture)).convert("RGB"))


def loose_side(folder: Path, batch_size: int) -> Callable[[], object]:
    """A pass of a plain DataLoader over loose files."""
    loader = DataLoader(LooseFiles(folder), batch_size, shuffle=True, drop_last=True)
    return lambda: sum(len(images) for images in loader)


def stream_side(split: SplitIndex, batch_size: int) -> Callable[[], object]:
    """A pass of the stream, up to normalised float batches."""

    def run() -> None:
        plan = PassPlan(split.shard_samples, batch_size, STREAMS, 0, "target")
        stream = TrainStream(split, plan, height=INPUT[0], width=INPUT[1], style="random")
        batches = stream.batches(0, plan.steps_per_pass)
        assert sum(len(batch.images) for batch in batches) == len(split)

    return run


def decoding_side(folder: Path) -> Callable[[], object]:
    """The same number of JPEGs, in memory, through the decoder: what no way can do without."""
    jpegs = [path.read_bytes() for path in sorted((folder / "bounding_box_train").iterdir())]
    return lambda: [simplejpeg.decode_jpeg(data) for data in jpegs]


def measure(cameras: int, pictures: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        loose, shards = Path(name) / "loose", Path(name) / "shards"
        write_loose_files(loose, pictures, cameras)
        dataset = read_dataset("market", loose)
        pack(dataset, shards, find_styles(dataset, "shipped"), workers=1)
        sides = {
            "bare decode": decoding_side(loose),
            "stream": stream_side(ShardIndex.load(str(shards)).split("train"), batch_size),
            "plain DataLoader": loose_side(loose, batch_size),
        }
        seconds = harness.alternate(sides, rounds, clock=time.process_time)
    rates = {f"{name}, pictures/s": round(pictures / value) for name, value in harness.medians(seconds).items()}
    return {
        "cameras": cameras,
        **rates,
        "stream / plain DataLoader": harness.median_ratio(seconds["plain DataLoader"], seconds["stream"]),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the results if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cameras", type=int, nargs="+", default=[6, 15], help="one case each (%(default)s)")
    parser.add_argument("--pictures", type=int, default=512, help="training pictures of a case (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="divides the pictures (%(default)s)")
    harness.add_options(parser, rounds=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(cameras, options.pictures, options.batch_size, options.rounds) for cameras in options.cameras]
    about = f"One core; JPEGs of {STORED[0]}x{STORED[1]}, batches of {options.batch_size} at {INPUT[0]}x{INPUT[1]}."
    harness.report(options, "data", harness.machine(), rows, f"{about}\n\n{harness.markdown_table(rows)}")
    return 0
