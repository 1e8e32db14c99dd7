"""The data path on one core: what is between the bytes of a JPEG and a batch, and what it costs.

Pictures and style copies are drawn, written as loose files in the Market-1501 layout, and packed. On both sides of a
comparison the same number of pictures is read, all from the system's page cache. Time is this process's processor
time, so that other processes on the machine disturb little, and one thread is used: figures are pictures/s of one core.

b pictures of a batch, H x W network input, h x w stored picture.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from benchmarks import harness
from ecn_dist.data import transforms
from ecn_dist.data.dataset import PictureDataset
from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.reader import ShardReader, decode
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


class LooseFiles(Dataset[tuple[Tensor, int]]):
    """The usual way: one file and one transform after the other (METHOD.md, "Training"), on PIL and torchvision."""

    def __init__(self, folder: Path, cameras: int) -> None:
        self.real: list[Path] = sorted((folder / "bounding_box_train").iterdir())
        self.copies = folder / "bounding_box_train_camstyle"
        self.cameras = cameras

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        path = self.real[at]
        own, drawn = int(path.name[6 : path.name.index("s")]), random.randint(1, self.cameras)
        if drawn != own:
            path = self.copies / f"{path.stem}_fake_{own}to{drawn}.jpg"
        picture = self.random_crop(Image.open(path).convert("RGB"))
        if random.random() < transforms.FLIP_PROBABILITY:
            picture = functional.hflip(picture)
        image = functional.normalize(
            functional.to_tensor(picture), transforms.IMAGENET_MEAN, transforms.IMAGENET_STD, inplace=True
        )
        return self.random_erasing(image), at

    def random_crop(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        for _ in range(transforms.MAX_CROP_TRIES):
            area = random.uniform(*transforms.CROP_AREA) * width * height
            aspect = random.uniform(*transforms.CROP_ASPECT)
            crop_height, crop_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if crop_height <= height and crop_width <= width:
                left, top = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
                picture = picture.crop((left, top, left + crop_width, top + crop_height))
                break
        return picture.resize(INPUT[::-1], Image.Resampling.BILINEAR)

    def random_erasing(self, image: Tensor) -> Tensor:
        if random.random() >= 0.5:
            return image
        height, width = INPUT
        for _ in range(transforms.MAX_ERASE_TRIES):
            area = random.uniform(*transforms.ECN.erase_area) * width * height
            aspect = random.uniform(*transforms.ECN.erase_aspect)
            box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if box_height <= height and box_width <= width:
                top, left = random.randint(0, height - box_height), random.randint(0, width - box_width)
                fill = torch.tensor(transforms.ECN.erase_fill).view(3, 1, 1)
                image[:, top : top + box_height, left : left + box_width] = fill
                break
        return image


def measure(sides: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Each side's processor seconds a picture, of every round; the sides take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-1, rounds):
        for name in list(sides)[:: 1 if round_number % 2 else -1]:
            started = time.process_time()
            pictures = sides[name]()
            if round_number >= 0:
                seconds[name].append((time.process_time() - started) / pictures)
    return seconds


def loose_side(folder: Path, cameras: int, batch_size: int) -> Callable[[], int]:
    """A pass of a plain DataLoader over loose files."""
    loader = DataLoader(LooseFiles(folder, cameras), batch_size, shuffle=True, drop_last=True)

    def run() -> int:
        return sum(len(images) for images, _ in loader)

    return run


def stream_side(split: SplitIndex, batch_size: int) -> Callable[[], int]:
    """A pass of the stream, up to normalised float batches."""

    def run() -> int:
        plan = PassPlan(split.shard_samples, batch_size, STREAMS, 0, "target")
        stream = TrainStream(split, plan, height=INPUT[0], width=INPUT[1], style="random")
        return sum(len(batch.images) for batch in stream.batches(0, plan.steps_per_pass))

    return run


def decoding_sides(split: SplitIndex, batch_size: int) -> dict[str, Callable[[], int]]:
    """A pass read and decoded, as the stream does it; and the same JPEGs in memory."""
    plan = PassPlan(split.shard_samples, batch_size, STREAMS, 0, "target")
    reader = ShardReader()
    dataset = PictureDataset(split, *INPUT, reader, style="random", domain="target")
    chosen = [dataset.choose(*plan.step(step))[0].ravel() for step in range(plan.steps_per_pass)]
    jpegs = [
        data
        for step, slots_b in enumerate(chosen)
        for data in reader.read_batch(split, plan.step(step).rows_b, slots_b)
    ]

    def read_and_decode() -> int:
        for step, slots_b in enumerate(chosen):
            for data in reader.read_batch(split, plan.step(step).rows_b, slots_b):
                decode(data)
        return plan.steps_per_pass * batch_size

    def bare() -> int:
        for data in jpegs:
            simplejpeg.decode_jpeg(data)
        return len(jpegs)

    return {"read and decode": read_and_decode, "bare decode": bare}


def part_sides() -> dict[str, Callable[[], int]]:
    """The parts of the way one by one, and the ways that were not taken."""
    rng = np.random.default_rng(1)
    count, (height, width) = 64, INPUT
    jpegs = [draw_picture(rng) for _ in range(count)]
    pictures = [Image.open(BytesIO(data)).convert("RGB") for data in jpegs]
    arrays = [np.array(picture) for picture in pictures]
    buffer = np.empty(STORED[0] * STORED[1] * 3, np.uint8)
    box = (7, 5, 115, 55)
    pixels_bHW3 = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    stored_b3hw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float32)
    grid_bHW2 = F.affine_grid(
        torch.tensor([[[0.8, 0, 0.1], [0, 0.9, -0.05]]] * count), [count, 3, height, width], align_corners=False
    )
    erased = torch.tensor([(20, 10, 80, 60), transforms.NO_BOX] * (count // 2))

    def each(function: Callable[[Any], object], items: list[Any]) -> Callable[[], int]:
        def run() -> int:
            for item in items:
                function(item)
            return len(items)

        return run

    def whole(function: Callable[[], object]) -> Callable[[], int]:
        def run() -> int:
            function()
            return count

        return run

    def normalise_one_by_one() -> None:
        for pixels_HW3 in pixels_bHW3:
            image = functional.to_tensor(pixels_HW3.numpy())
            functional.normalize(image, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD, inplace=True)

    top, left, crop_height, crop_width = box
    return {
        "decode: PIL": each(lambda data: np.asarray(Image.open(BytesIO(data)).convert("RGB")), jpegs),
        "decode: simplejpeg": each(simplejpeg.decode_jpeg, jpegs),
        "decode: simplejpeg, memory used again *": each(lambda d: simplejpeg.decode_jpeg(d, buffer=buffer), jpegs),
        "crop and resize: PIL": each(
            lambda picture: picture.crop((left, top, left + crop_width, top + crop_height)).resize(
                (width, height), Image.Resampling.BILINEAR
            ),
            pictures,
        ),
        "crop and resize: torch uint8, one by one *": each(
            lambda array: transforms.resize_into(pixels_bHW3[0], array, box), arrays
        ),
        "crop and resize: float batch, grid_sample": whole(
            lambda: F.grid_sample(stored_b3hw, grid_bHW2, mode="bilinear", align_corners=False)
        ),
        "normalise: one by one": whole(normalise_one_by_one),
        "normalise and erase: whole batch *": whole(lambda: transforms.normalise_and_erase(pixels_bHW3, erased)),
    }


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cameras", type=int, nargs="+", default=[6, 15], help="one case each (%(default)s)")
    parser.add_argument("--pictures", type=int, default=512, help="training pictures of a case (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="(%(default)s)")
    harness.add_options(parser, rounds=9)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, write the results if asked to."""
    args = options(argv)
    torch.set_num_threads(1)
    described = harness.machine()
    rows: list[dict[str, Any]] = []
    for cameras in args.cameras:
        with tempfile.TemporaryDirectory() as name:
            loose, shards = Path(name) / "loose", Path(name) / "shards"
            write_loose_files(loose, args.pictures, cameras)
            dataset = read_dataset("market", loose)
            pack(dataset, shards, find_styles(dataset, "shipped"), workers=1)
            split = ShardIndex.load(str(shards)).split("train")
            sides = decoding_sides(split, args.batch_size)
            sides["stream"] = stream_side(split, args.batch_size)
            sides["plain DataLoader"] = loose_side(loose, cameras, args.batch_size)
            seconds = measure(sides, args.rounds)
        rates = {name: 1 / median for name, median in harness.medians(seconds).items()}
        rows.append(
            {"cameras": cameras, "style copies": cameras - 1}
            | {f"{name}, pictures/s": round(rate) for name, rate in rates.items()}
            | {
                "read and decode / bare decode": harness.median_ratio(
                    seconds["bare decode"], seconds["read and decode"]
                ),
                "stream / plain DataLoader": harness.median_ratio(seconds["plain DataLoader"], seconds["stream"]),
            }
        )
    parts = [
        {"part": name, "microseconds a picture": 1e6 * median}
        for name, median in harness.medians(measure(part_sides(), args.rounds)).items()
    ]
    about = f"One core; {STORED[0]}x{STORED[1]} JPEGs, batches of {args.batch_size} at {INPUT[0]}x{INPUT[1]}."
    tables = [
        about,
        harness.markdown_table(rows),
        harness.markdown_table(parts),
        "Marked with a star: what the stream does.",
    ]
    print(*tables, sep="\n\n")
    if args.output:
        path = harness.write_results(
            args.output,
            "data",
            described,
            rows + parts,
            name=args.machine,
            title="The data path",
            tables="\n\n".join(tables),
        )
        print(f"written: {path} and beside it .md")
    return 0
