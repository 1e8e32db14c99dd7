"""Writing a synthetic domain as a Market-1501 style folder."""

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ecn_dist.errors import UserError
from ecn_dist.processes import choose_workers, run_jobs
from ecn_dist.synthetic.scene import Studio
from ecn_dist.synthetic.spec import DomainSpec

TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"
RECORD = "synthetic.json"
GENERATOR_VERSION = 2  # raised whenever the same arguments give other pictures than before
LARGEST_SEED = 2**63 - 1
PACKED_MEANWHILE = 10  # pictures that are packed in the time that one is drawn, about

TestSplit = Literal["test", "validation"]
_PID_OFFSETS = {"train": 1, "test": 2, "validation": 3}


@dataclass(frozen=True)
class DomainSize:
    """How much of a domain is drawn, and how large. `UserError` where the numbers make no sense."""

    train_identities: int
    test_identities: int
    cameras: int
    pictures_per_camera: int
    height: int = 64
    width: int = 32
    test_split: TestSplit = "test"

    def __post_init__(self) -> None:
        measurable = self.test_identities == 0 or min(self.cameras, self.pictures_per_camera) >= 2
        for right, what in (
            (min(self.train_identities, self.test_identities) >= 0, "numbers of identities of 0 or more"),
            (min(self.cameras, self.pictures_per_camera) >= 1, "at least one camera and one picture per camera"),
            (measurable, "two cameras and two pictures per camera, or a query has no true match in the gallery"),
            (self.height >= 16 and self.width >= 8, f"pictures of at least 16 x 8, not {self.height} x {self.width}"),
        ):
            if not right:
                raise UserError(f"a synthetic domain needs {what}")


def pids_of(split: str, count: int) -> range:
    """The identities of `split`: every third number, so that train, test and validation never share one, whatever
    their counts."""
    return range(_PID_OFFSETS[split], _PID_OFFSETS[split] + 3 * count, 3)


_Job = tuple[Studio, int, int, list[Path]]


def _draw(job: _Job) -> None:
    """All pictures of one identity: number n of a camera goes to the n-th of the folders, or to the last."""
    studio, pictures_per_camera, pid, folders = job
    person = studio.person(pid)
    for camid, camera in enumerate(studio.cameras):
        for number in range(pictures_per_camera):
            picture = studio.picture(person, pid, camid, number)
            # As Market-1501 names them: camera counted from 1, sequence, frame, box.
            name = f"{pid:04d}_c{camid + 1}s1_{25 * number + 1:06d}_00.jpg"
            path = folders[min(number, len(folders) - 1)] / name
            picture.save(path, "JPEG", quality=camera.jpeg_quality, subsampling=0)


def write_domain(
    folder: str | Path, spec: DomainSpec, size: DomainSize, *, seed: int, workers: int | None = None
) -> int:
    """Draw a domain into `folder` (made, complete or not at all) and return its number of pictures.

    `bounding_box_train` gets `train_identities` x `cameras` x `pictures_per_camera` pictures. Of the test identities,
    one picture per identity and camera is a `query`, the others are the gallery, `bounding_box_test`. With `test_split`
    "validation" other identities are drawn for it, for choosing settings, and the training pictures stay the same.
    The same arguments give the same bytes for any number of `workers` (by default as is worth it). `synthetic.json`
    records the arguments: a folder that already holds just this domain is left as it is. Raises `UserError` where the
    seed makes no sense, `folder` holds something else, or a worker was killed.
    """
    folder = Path(folder)
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"the seed of a synthetic domain is 0 to {LARGEST_SEED}, not {seed}")
    count = (size.train_identities + size.test_identities) * size.cameras * size.pictures_per_camera
    record = {"generator_version": GENERATOR_VERSION, "seed": seed} | asdict(size) | {"spec": asdict(spec)}
    text = json.dumps(record, indent=1) + "\n"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / RECORD).is_file() and (folder / RECORD).read_text() == text:
            return count
        raise UserError(f"{folder} already holds something else: name another folder, or remove this one")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")  # another process may write the same folder
    try:
        for part in (TRAIN, GALLERY, QUERY):
            (partial / part).mkdir(parents=True)
        studio = Studio(spec, seed=seed, cameras=size.cameras, height=size.height, width=size.width)
        train, test = pids_of("train", size.train_identities), pids_of(size.test_split, size.test_identities)
        people = [(pid, [partial / TRAIN]) for pid in train]
        people += [(pid, [partial / QUERY, partial / GALLERY]) for pid in test]
        jobs = [(studio, size.pictures_per_camera, pid, folders) for pid, folders in people]
        run_jobs(_draw, jobs, choose_workers(workers, PACKED_MEANWHILE * count), "identities")
        (partial / RECORD).write_text(text)
        os.replace(partial, folder)  # which may be there if it is empty
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count
