"""Writing a synthetic domain as a Market-1501 style folder."""

import json
import multiprocessing
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ecn_dist.errors import UserError
from ecn_dist.synthetic.scene import Studio
from ecn_dist.synthetic.spec import DomainSpec

TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"
RECORD = "synthetic.json"
GENERATOR_VERSION = 1
"""Raised whenever the same arguments give other pictures than before."""

TestSplit = Literal["test", "validation"]
_PID_OFFSETS = {"train": 1, "test": 2, "validation": 3}


def pids_of(split: str, count: int) -> range:
    """The identities of `split`: every third number, so that train, test and validation never share one, whatever
    their counts."""
    return range(_PID_OFFSETS[split], _PID_OFFSETS[split] + 3 * count, 3)


def file_name(pid: int, camid: int, number: int) -> str:
    """The Market-1501 name of a picture: `0002_c1s1_000451_03.jpg` (camera counted from 1, sequence, frame, box)."""
    return f"{pid:04d}_c{camid + 1}s1_{25 * number + 1:06d}_00.jpg"


@dataclass(frozen=True)
class _Job:
    """All pictures of one identity."""

    pid: int
    split: str


class _Writer:
    """Writes the pictures of an identity; a picture's bytes depend on its name alone."""

    def __init__(
        self, folder: Path, spec: DomainSpec, seed: int, cameras: int, pictures_per_camera: int, height: int, width: int
    ) -> None:
        self.folder, self.pictures_per_camera = folder, pictures_per_camera
        self.studio = Studio(spec, seed=seed, cameras=cameras, height=height, width=width)

    def __call__(self, job: _Job) -> int:
        person = self.studio.person(job.pid)
        for camid, camera in enumerate(self.studio.cameras):
            for number in range(self.pictures_per_camera):
                part = TRAIN if job.split == "train" else QUERY if number == 0 else GALLERY
                picture = self.studio.picture(person, job.pid, camid, number)
                path = self.folder / part / file_name(job.pid, camid, number)
                picture.save(path, "JPEG", quality=camera.jpeg_quality, subsampling=0)
        return len(self.studio.cameras) * self.pictures_per_camera


_writer: _Writer | None = None


def _start_worker(*arguments: object) -> None:
    global _writer
    _writer = _Writer(*arguments)  # type: ignore[arg-type]


def _work(job: _Job) -> int:
    assert _writer is not None
    return _writer(job)


def write_domain(
    folder: str | Path,
    spec: DomainSpec,
    *,
    seed: int,
    train_identities: int,
    test_identities: int,
    cameras: int,
    pictures_per_camera: int,
    height: int = 64,
    width: int = 32,
    test_split: TestSplit = "test",
    workers: int = 1,
) -> int:
    """Draw a domain into `folder` (made, complete or not at all) and return its number of pictures.

    `bounding_box_train` gets `train_identities` x `cameras` x `pictures_per_camera` pictures. Of the test identities,
    one picture per identity and camera is a `query`, the others are the gallery, `bounding_box_test`. With `test_split`
    "validation" other identities are drawn for it, for choosing settings, and the training pictures stay the same.
    The same arguments give the same bytes for any number of `workers` (processes). `synthetic.json` records the
    arguments: a folder that already holds just this domain is left as it is.

    Raises:
        UserError: an argument makes no sense, or `folder` holds something else.
    """
    folder = Path(folder)
    _check(train_identities, test_identities, cameras, pictures_per_camera, height, width, test_split, workers)
    count = (train_identities + test_identities) * cameras * pictures_per_camera
    record = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "train_identities": train_identities,
        "test_identities": test_identities,
        "cameras": cameras,
        "pictures_per_camera": pictures_per_camera,
        "height": height,
        "width": width,
        "test_split": test_split,
        "spec": asdict(spec),
    }
    text = json.dumps(record, indent=1) + "\n"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / RECORD).is_file() and (folder / RECORD).read_text() == text:
            return count
        raise UserError(f"{folder} already holds something else: name another folder, or remove this one")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (TRAIN, GALLERY, QUERY):
        (partial / part).mkdir(parents=True)
    jobs = [_Job(pid, "train") for pid in pids_of("train", train_identities)]
    jobs += [_Job(pid, test_split) for pid in pids_of(test_split, test_identities)]
    arguments = (partial, spec, seed, cameras, pictures_per_camera, height, width)
    if workers == 1:
        writer = _Writer(*arguments)
        for job in jobs:
            writer(job)
    else:
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, arguments) as pool:
            for _ in pool.imap_unordered(_work, jobs, chunksize=4):
                pass
    (partial / RECORD).write_text(text)
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)
    return count


def _check(
    train_identities: int,
    test_identities: int,
    cameras: int,
    pictures_per_camera: int,
    height: int,
    width: int,
    test_split: str,
    workers: int,
) -> None:
    def require(right: bool, what: str) -> None:
        if not right:
            raise UserError(f"a synthetic domain needs {what}")

    require(train_identities >= 0 and test_identities >= 0, "numbers of identities of 0 or more")
    require(cameras >= 1 and pictures_per_camera >= 1, "at least one camera and one picture per camera")
    require(
        test_identities == 0 or (cameras >= 2 and pictures_per_camera >= 2),
        "two cameras and two pictures per camera, or a query has no true match in the gallery",
    )
    require(height >= 16 and width >= 8, f"pictures of at least 16 x 8, not {height} x {width}")
    require(test_split in ("test", "validation"), f"test_split to be test or validation, not {test_split!r}")
    require(workers >= 1, f"at least one worker, not {workers}")
