"""Tiny data sets in the layouts of the field, for tests."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.packing.layouts import read_dataset
from ecn_dist.packing.shards import pack
from ecn_dist.packing.styles import find_styles

MARKET = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def picture(seed: Iterable[int], height: int = 32, width: int = 16, light: float = 1.0) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(list(seed))
    small = Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).point(lambda value: int(light * value))


def jpeg_bytes(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=90, **options)
    return buffer.getvalue()


def write_picture(path: Path, seed: Iterable[int], light: float = 1.0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg_bytes(picture(seed, light=light), **options))


def write_market(root: Path, *, identities: int = 4, cameras: int = 3, splits: Sequence[str] = tuple(MARKET)) -> Path:
    """A Market-1501 style folder: one picture of each person from each camera, two in training, some junk.

    Camera n has 1 / n of the first one's light. Test people are 101, 102, ...; the gallery also holds 2 distractors
    (pid 0), 1 junk picture (pid -1), and `Thumbs.db`, as the real one does.
    """
    for split in splits:
        folder, first = root / MARKET[split], 1 if split == "train" else 101
        for pid in range(first, first + identities):
            for camera in range(1, cameras + 1):
                for number in range(2 if split == "train" else 1):
                    name = f"{pid:04d}_c{camera}s1_{number:06d}_00.jpg"
                    write_picture(folder / name, (len(split), pid, camera, number), light=1 / camera)
    if "gallery" in splits:
        folder = root / MARKET["gallery"]
        write_picture(folder / "0000_c1s1_000001_00.jpg", (1,))
        write_picture(folder / "0000_c2s1_000002_00.jpg", (2,))
        write_picture(folder / "-1_c2s1_000003_00.jpg", (3,))
        (folder / "Thumbs.db").write_bytes(b"no picture")
    return root


def pack_folder(
    root: Path, output: Path, *, layout: str = "market", camera_style: str = "none", **options: Any
) -> ShardIndex:
    """Pack in this process, and read the index."""
    dataset = read_dataset(layout, root)
    options = {"workers": 1} | options
    pack(dataset, output, find_styles(dataset, camera_style, workers=1), **options)
    return ShardIndex.load(str(output))


def folder_bytes(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def member(split: SplitIndex, row: np.void, slot: int) -> bytes:
    """A member's bytes, by offset alone."""
    with open(split.shard_path(int(row["shard"])), "rb") as file:
        file.seek(row["offset"][slot])
        return file.read(row["length"][slot])
