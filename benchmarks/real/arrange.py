"""Arrange crops of Market-1501 and CUHK03 as Market-1501 style folders: the data of the benchmark on real pictures.

    python -m benchmarks.real.arrange --market FOLDER/train --cuhk FOLDER/detected --output FOLDER

`--market` holds the training split of Market-1501, `--cuhk` the folders train and val of CUHK03's detected boxes
(`PID_NUMBER.jpg`; numbers 0..4 are the one camera, 5..9 the other). Made are, by hard links:

    cuhk03             source: identities 1..421 to train, the others to test
    market_validation  target: Market-1501's identities 377.. to train (375), its first 100 to evaluate
    market_test        the same pictures to train, its identities 101..376 to evaluate

The pictures show real people: keep them outside every repository.
"""

import argparse
import collections
import os
import random
import re
import sys
from collections.abc import Iterable, Set
from pathlib import Path
from typing import NamedTuple

from ecn_dist.command import command
from ecn_dist.errors import UserError

NUM_VALIDATION, NUM_EVALUATED = 100, 376  # of Market-1501's identities, in their order
NUM_SOURCE = 421  # of CUHK03's
_MARKET_NAME = re.compile(r"(\d{4})_c(\d)s(\d)_(\d{6})_(\d\d)\.jpg")
_CUHK_NAME = re.compile(r"(\d{4})_(\d\d)\.jpg")


class Crop(NamedTuple):
    pid: int
    camera: int
    sequence: int
    frame: int
    number: int
    path: Path

    @property
    def name(self) -> str:
        return "{:04d}_c{}s{}_{:06d}_{:02d}.jpg".format(*self[:5])


def read_market(folder: Path) -> list[Crop]:
    """The crops in a folder of Market-1501, by their names; other files are passed over."""
    crops = []
    for path in _entries(folder):
        if match := _MARKET_NAME.fullmatch(path.name):
            pid, camera, sequence, frame, number = map(int, match.groups())
            crops.append(Crop(pid, camera, sequence, frame, number, path))
    return crops


def read_cuhk(folder: Path) -> list[Crop]:
    """The crops in CUHK03's folders train and val; the validation identities follow the training ones."""
    crops = []
    for split, offset in (("train", 1), ("val", 744)):
        for path in _entries(folder / split):
            if match := _CUHK_NAME.fullmatch(path.name):
                pid, number = map(int, match.groups())
                crops.append(Crop(pid + offset, 1 if number < 5 else 2, 1, number, 0, path))
    return crops


def arrange(crops: Iterable[Crop], output: Path, train: Set[int], test: Set[int]) -> dict[str, int]:
    """Link the crops of these identities into a Market-1501 style folder.

    One query is drawn, with a fixed seed, for each test identity and camera, where other cameras saw the identity too;
    the identity's other crops are the gallery.

    Returns:
        The number of crops by folder.
    """
    rng, places, count = random.Random(0), collections.defaultdict(list), collections.Counter[str]()

    def link(crop: Crop, folder: str) -> None:
        target = output / folder / crop.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(crop.path, target)
        count[folder] += 1

    for crop in sorted(crops):
        if crop.pid in train:
            link(crop, "bounding_box_train")
        elif crop.pid in test:
            places[crop.pid, crop.camera].append(crop)
    cameras = collections.Counter(pid for pid, _ in places)
    for (pid, _), seen in sorted(places.items()):
        query = rng.choice(seen) if cameras[pid] > 1 else None
        for crop in seen:
            link(crop, "query" if crop is query else "bounding_box_test")
    return dict(count)


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give --market and --cuhk as docs/results.md says")
    return sorted(folder.iterdir())


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--market", type=Path, required=True, help="folder with Market-1501's training crops")
    parser.add_argument("--cuhk", type=Path, required=True, help="folder with CUHK03's detected crops: train, val")
    parser.add_argument("--output", type=Path, required=True, help="outside every repository, on the same disk")
    options = parser.parse_args(argv)
    market, cuhk = read_market(options.market), read_cuhk(options.cuhk)
    for crops, folder, like in (
        (market, options.market, "0002_c1s1_000451_03.jpg"),
        (cuhk, options.cuhk, "train/0000_05.jpg or val/0000_05.jpg"),
    ):
        if not crops:
            raise UserError(f'{folder} holds no crops named as {like}; see docs/results.md, "How to repeat it"')
    ids = sorted({crop.pid for crop in market})
    train, source = set(ids[NUM_EVALUATED:]), set(range(1, NUM_SOURCE + 1))
    evaluated = {"validation": set(ids[:NUM_VALIDATION]), "test": set(ids[NUM_VALIDATION:NUM_EVALUATED])}
    made = {f"market_{name}": (market, train, test) for name, test in evaluated.items()}
    made["cuhk03"] = cuhk, source, {crop.pid for crop in cuhk} - source
    for folder, (crops, to_train, to_test) in made.items():
        count = arrange(crops, options.output / folder, to_train, to_test)
        sizes = ", ".join(f"{name} {number}" for name, number in sorted(count.items()))
        print(f"{options.output / folder}: {len(to_train)} identities to train, {len(to_test)} to test; {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
