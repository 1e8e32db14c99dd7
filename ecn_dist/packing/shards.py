"""Records -> shards: tar files that webdataset writes, a sidecar of byte offsets per split, and index.json last.

The same input gives the same bytes, for any number of workers and any version of NumPy: samples are put in an order
that a seed gives, cut into shards of equal counts, and every member has the same owner, mode and time. Everything is
written in a folder inside the output and moved when all of it is there, so that an interrupted pack leaves no
index.json and no half shard.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from filelock import FileLock, Timeout
from PIL import Image

from ecn_dist.data.draws import Draws
from ecn_dist.data.index import INDEX_NAME, ShardInfo, member_dtype
from ecn_dist.data.index_gate import FORMAT_NAME, FORMAT_VERSION, SPLIT_NAMES, UNKNOWN_PID
from ecn_dist.data.pictures import UnreadablePicture, as_stored, check_size, encode, read_file
from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically
from ecn_dist.packing.records import Dataset, Record, check_queries, first_few, identities_in_order, refuse_unreadable
from ecn_dist.packing.styles import Styles, in_styles
from ecn_dist.processes import choose_workers, run_jobs

TAR_BLOCK = 512
MEASURED_SAMPLES = 64  # written beforehand, to learn how many bytes a sample takes
UNFINISHED, WHOLE, LOCK_NAME = ".packing-", ".packed", ".packing.lock"
_OUR_FILES = re.compile(rf"({'|'.join(SPLIT_NAMES)})(-\d{{6,}}\.tar|\.members\.npy)")


@dataclass(frozen=True)
class Sample:
    """What becomes one sample of a shard."""

    index: int
    camid: int
    record: Record
    copies: Mapping[int, str]  # shipped style copies: paths by camid


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    folder: Path
    split: str
    position: int  # in the split's list of shards
    samples: Sequence[Sample]
    num_cameras: int
    tables_CCKV: np.ndarray | None  # histogram style copies are made with these
    max_size: tuple[int, int] | None


Packed = tuple[ShardInfo, np.ndarray, list[str]]  # with the rows of the sidecar, and the pictures that cannot be read


def picture_suffix(slot: int, num_cameras: int) -> str:
    """The end of a member's name: slot c < C is the copy in camera c's style, slot C the picture itself."""
    return "jpg" if slot == num_cameras else f"cam{slot:02d}.jpg"


def pack(
    dataset: Dataset,
    output: Path,
    styles: Styles,
    *,
    shard_mib: float = 64,
    min_shards: int = 1,
    workers: int | None = None,
    seed: int = 0,
    max_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the shard folder.

    Args:
        styles: what the training split's style copies are (`ecn_dist.packing.styles`).
        shard_mib: about how large a shard is.
        min_shards: how many shards each split has at least, as far as its samples go.
        workers: processes; unless given as many as there are cores, if the data set is large enough.
        max_size: (height, width); larger pictures are reduced to fit.
        overwrite: replace the shards that `output` holds; they stay until the new ones are complete.

    Raises `UserError` where no query has a true match, pictures cannot be read, and as `new_shards` does.
    """
    check_queries(dataset)
    with new_shards(output, overwrite) as unfinished:
        jobs: list[ShardJob] = []
        for split, records in dataset.splits.items():
            own = styles if split == "train" else Styles("none")
            samples = [
                Sample(index, dataset.camids[record.camera], record, own.copies.get(record.file, {}))
                for index, record in enumerate(records)
            ]
            whole = ShardJob(unfinished, split, 0, samples, len(dataset.cameras), own.tables_CCKV, max_size)
            jobs += _divide(whole, shard_mib, min_shards, seed)
        pictures = sum(map(len, dataset.splits.values()))
        packed = run_jobs(write_shard, jobs, choose_workers(workers, pictures), "shards")
        refuse_unreadable([name for _, _, unreadable in packed for name in unreadable])
        index: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "layout": dataset.layout,
            "num_cameras": len(dataset.cameras),
            "cameras": list(dataset.cameras),
            "camera_style": styles.kind,
            "seed": seed,
            "max_size": max_size,
            "splits": {},
        }
        for split, records in dataset.splits.items():
            shards = [shard for job, shard in zip(jobs, packed, strict=True) if job.split == split]
            members = np.concatenate([rows for _, rows, _ in shards])
            sidecar = unfinished / f"{split}.members.npy"
            np.save(sidecar, members, allow_pickle=False)
            identities = identities_in_order(record.pid for record in records)
            index["splits"][split] = {
                "samples": len(members),
                "num_identities": len(identities),
                "identities": identities,  # label = position
                "unknown_identities": int((members["pid"] == UNKNOWN_PID).sum()),
                "camids": np.unique(members["camid"]).tolist(),
                "junk_dropped": dataset.junk[split],
                "distractors": dataset.distractors if split == "gallery" else 0,
                "missing_styles": styles.missing if split == "train" else None,
                "members": describe_file(sidecar),
                "shards": [asdict(info) for info, _, _ in shards],
            }
        write_index(unfinished, index)


@contextmanager
def new_shards(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder within `output` to write shards, sidecars and index into, whose files become `output`'s in the end.

    They replace the shards that `output` holds, if `overwrite` allows that; index.json comes last, so that a folder
    that has one is whole. After an exception, `output` holds what it held; a kill while they are replaced is made good
    by the next call. Raises `UserError` where `output` holds
    shards, another process packs into it, or it cannot be written.
    """
    check_output(output, overwrite)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _only_packer(output):
            _take_over(output)
            check_output(output, overwrite)  # another may just have ended
            folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=output))
            try:
                yield folder
                folder.rename(output / WHOLE)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            try:
                _take_over(output)
            except KeyboardInterrupt:  # the end is near, and half of two packs is nothing
                _take_over(output)
                raise
    except OSError as error:  # pictures that cannot be read are collected, so this is the output
        raise UserError(f"cannot write {output}: {error}") from error


def _take_over(output: Path) -> None:
    """Put a whole new pack in the place of what `output` holds. Goes on where a kill ended it."""
    whole = output / WHOLE
    if (index := whole / INDEX_NAME).is_file():
        splits = json.loads(index.read_bytes())["splits"].values()
        new = {file["name"] for split in splits for file in (split["members"], *split["shards"])}
        for path in _holds_shards(output):
            if path.name not in new:
                path.unlink()
        for path in sorted(whole.iterdir(), key=lambda path: path == index):
            (output / INDEX_NAME).unlink(missing_ok=True)
            path.replace(output / path.name)
    shutil.rmtree(whole, ignore_errors=True)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json."""
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


@contextmanager
def _only_packer(output: Path) -> Iterator[None]:
    """Holds the output for this process while the block runs; `UserError` where another one holds it.

    The lock is the system's, so it ends with its owner, however that ends. What a killed pack left is removed.
    """
    path = output / LOCK_NAME
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = path.read_text(encoding="utf-8") if path.exists() else ""
        raise UserError(f"{output} is being packed by {owner or 'another process'}; wait, or name another") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        for left in output.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it finds that it is gone, and makes another
        lock.release()


@contextmanager
def open_shard(path: Path) -> Iterator[webdataset.TarWriter]:
    """A new tar file for `add_sample`, whose bytes depend on nothing but the samples."""
    with (
        open(path, "wb") as file,
        webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar,
    ):
        yield tar


def write_shard(job: ShardJob) -> Packed:
    """Write one shard; a picture that cannot be read is reported, not written."""
    members = np.zeros(len(job.samples), member_dtype(job.num_cameras))
    unreadable: list[str] = []
    path = job.folder / f"{job.split}-{job.position:06d}.tar"
    with open_shard(path) as tar:
        for row, sample in zip(members, job.samples, strict=True):
            try:
                _write_sample(sample, job, tar, row)
            except UnreadablePicture as error:
                unreadable.append(str(error))
    return ShardInfo(samples=len(members), **describe_file(path)), members, unreadable


def _write_sample(sample: Sample, job: ShardJob, tar: webdataset.TarWriter, row: np.void) -> None:
    """Append the sample's members to the shard and fill in its row of the sidecar."""
    pid, camid = sample.record.pid, sample.camid
    stored, image = _read(sample.record.path, job.max_size)
    pictures = {job.num_cameras: stored}  # by slot
    if job.tables_CCKV is not None:
        others = [other for other in range(job.num_cameras) if other != camid]
        styled = in_styles(image, job.tables_CCKV[camid], others)
        pictures |= {other: encode(copy) for other, copy in styled.items()}
    pictures |= {other: _read(path, job.max_size)[0] for other, path in sample.copies.items()}
    row["shard"], row["index"], row["pid"], row["camid"] = job.position, sample.index, pid, camid
    about = {"index": sample.index, "pid": pid, "camid": camid, "file": sample.record.file}
    add_sample(tar, row, pictures, json.dumps(about).encode())


def add_sample(tar: webdataset.TarWriter, row: np.void, pictures: Mapping[int, bytes], about: bytes) -> None:
    """Append the members of a sample: its pictures by slot, then KEY.json; note their places in its `row`.

    The row is one of `member_dtype`, with the sample's index.
    """
    key, num_cameras = f"{row['index']:08d}", len(row["offset"]) - 1

    def add(suffix: str, data: bytes) -> tuple[int, int]:
        """Append the member KEY.SUFFIX; offset and length of its data."""
        tar.write({"__key__": key, suffix: data})
        return tar.tarstream.offset - -(-len(data) // TAR_BLOCK) * TAR_BLOCK, len(data)

    for slot, data in sorted(pictures.items()):
        row["offset"][slot], row["length"][slot] = add(picture_suffix(slot, num_cameras), data)
    row["json_offset"], row["json_length"] = add("json", about)


def _read(path: str, max_size: tuple[int, int] | None) -> tuple[bytes, Image.Image]:
    try:
        data, image = as_stored(read_file(path), max_size)
        check_size(image.height, image.width)  # which `max_size` may have made too small
    except (OSError, UnreadablePicture) as error:
        raise UnreadablePicture(f"{path} ({error})") from error
    return data, image


def _divide(whole: ShardJob, shard_mib: float, min_shards: int, seed: int) -> list[ShardJob]:
    """The split's samples in seeded random order, cut into shards of equal counts (plus or minus one)."""

    def job(position: int, rows: np.ndarray) -> ShardJob:
        return replace(whole, position=position, samples=[whole.samples[row] for row in rows.tolist()])

    count = len(whole.samples)
    spaced = np.linspace(0, count - 1, min(MEASURED_SAMPLES, count)).round().astype(int)
    _, members, unreadable = write_shard(job(0, spaced))  # a trial, which the first shard replaces
    readable = len(spaced) - len(unreadable)
    # The last member is a KEY.json of one block.
    sample_bytes = (int(members["json_offset"].max()) + TAR_BLOCK) / readable if readable else 0.0
    shards = max(min_shards, round(sample_bytes * count / (shard_mib * 2**20)), 1)
    order = Draws(seed, whole.split, "packing").permutation(count, (0, 0, 0))
    return [job(position, rows) for position, rows in enumerate(np.array_split(order, min(shards, count)))]


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size in bytes and sha256, as index.json has them."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def _holds_shards(output: Path) -> list[Path]:
    """index.json first, so that a folder without its shards has no index either."""
    held = [path for path in output.glob("*") if path.name == INDEX_NAME or _OUR_FILES.fullmatch(path.name)]
    return sorted(held, key=lambda path: (path.name != INDEX_NAME, path.name))


def check_output(output: Path, overwrite: bool) -> None:
    """`UserError` where the output is no folder, or holds shards that are not to be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder for the shards")
    if (held := _holds_shards(output)) and not overwrite and not (output / WHOLE).is_dir():
        names = first_few(path.name for path in held)
        raise UserError(f"{output} already holds shards ({names}). Remove them (`pack`: --overwrite), or name another")
