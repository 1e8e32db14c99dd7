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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from filelock import FileLock, Timeout

from ecn_dist.data.draws import Draws
from ecn_dist.data.index import INDEX_NAME, ShardInfo, member_dtype
from ecn_dist.data.index_gate import FORMAT_NAME, FORMAT_VERSION, UNKNOWN_PID
from ecn_dist.data.pictures import UnreadablePicture, as_stored, encode
from ecn_dist.errors import UserError
from ecn_dist.packing.records import (
    SPLITS,
    Dataset,
    Record,
    check_queries,
    first_few,
    identities_in_order,
    refuse_unreadable,
)
from ecn_dist.packing.styles import Styles, in_styles
from ecn_dist.processes import Track, choose_workers, run_jobs, untracked

MIB = 2**20
TAR_BLOCK = 512
LEAST_SIDE = 2  # of a picture, in pixels
MEASURED_SAMPLES = 64  # encoded beforehand, to learn how many bytes a sample takes
UNFINISHED, LOCK_NAME = ".packing-", ".packing.lock"
_OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})(-\d{{6,}}\.tar|\.members\.npy)")


@dataclass(frozen=True)
class Sample:
    """What becomes one sample of a shard."""

    index: int
    camid: int
    record: Record
    copies: tuple[str | None, ...] = ()  # shipped style copies: a path for each camera, None where there is none


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    path: Path
    position: int  # in the split's list of shards
    samples: Sequence[Sample]
    num_cameras: int
    tables_CCKV: np.ndarray | None  # histogram style copies are made with these
    max_size: tuple[int, int] | None


@dataclass(frozen=True)
class PackedShard:
    info: ShardInfo
    members: np.ndarray
    unreadable: list[str]


def picture_suffix(slot: int, num_cameras: int) -> str:
    """The end of a member's name: slot c < C is the copy in camera c's style, slot C the picture itself."""
    return "jpg" if slot == num_cameras else f"cam{slot:02d}.jpg"


class ShardFile:
    """webdataset's tar writer, which also tells at which byte each member's data begins, and the file's checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._tar = webdataset.TarWriter(self, encoder=False, user="", group="", mode=0o644, mtime=0)

    def write(self, data: bytes) -> int:
        """Called by the tar writer."""
        self._sha256.update(data)
        return self._file.write(data)

    def add(self, key: str, suffix: str, data: bytes) -> int:
        """Append the member KEY.SUFFIX; the byte offset of its data."""
        self._tar.write({"__key__": key, suffix: data})
        return self._tar.tarstream.offset - _padded(len(data))

    def finish(self) -> tuple[int, str]:
        """End the archive; its bytes and sha256."""
        self._tar.close()
        return self._file.tell(), self._sha256.hexdigest()


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
    track: Track = untracked,
) -> dict[str, Any]:
    """Write the shard folder; what `index.json` says.

    Args:
        styles: what the training split's style copies are (`ecn_dist.packing.styles`).
        shard_mib: about how large a shard is.
        min_shards: how many shards each split has at least, as far as its samples go.
        workers: processes; unless given as many as there are cores, if the data set is large enough.
        max_size: (height, width); larger pictures are reduced to fit.
        overwrite: replace the shards that `output` holds; they stay until the new ones are complete.

    Raises:
        UserError: no query has a true match, `output` holds shards or another process packs into it, pictures cannot be
            read, the disk is full.
    """
    check_queries(dataset)
    check_output(output, overwrite)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _only_packer(output), tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=output) as folder:
            check_output(output, overwrite)  # another may just have ended
            unfinished = Path(folder)
            jobs = {
                split: _plan_shards(dataset, split, unfinished, styles, shard_mib, min_shards, seed, max_size)
                for split in dataset.splits
            }
            flat = [job for split_jobs in jobs.values() for job in split_jobs]
            processes = choose_workers(workers, sum(map(len, dataset.splits.values())))
            packed = run_jobs(write_shard, flat, processes, "shards", track)
            refuse_unreadable([name for shard in packed for name in shard.unreadable])
            remaining = iter(packed)
            splits = {
                split: _describe_split(dataset, split, unfinished, [next(remaining) for _ in split_jobs], styles)
                for split, split_jobs in jobs.items()
            }
            index = {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "layout": dataset.layout,
                "num_cameras": len(dataset.cameras),
                "cameras": list(dataset.cameras),
                "camera_style": styles.kind,
                "seed": seed,
                "max_size": max_size,
                "splits": splits,
            }
            _publish(unfinished, output, index)
    except OSError as error:  # pictures that cannot be read are collected, so this is the output
        raise UserError(f"cannot write {output}: {error}") from error
    return index


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
        raise UserError(
            f"{output} is being packed by {owner or 'another process'}. Wait for it, or name another folder"
        ) from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        for left in output.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it finds that it is gone, and makes another
        lock.release()


def write_shard(job: ShardJob) -> PackedShard:
    """Write one shard; a picture that cannot be read is reported, not written."""
    members = np.zeros(len(job.samples), member_dtype(job.num_cameras))
    unreadable: list[str] = []
    with open(job.path, "wb") as file:
        shard = ShardFile(file)
        for row, sample in zip(members, job.samples, strict=True):
            try:
                _write_sample(sample, job, shard, row)
            except UnreadablePicture as error:
                unreadable.append(str(error))
        size, sha256 = shard.finish()
    return PackedShard(ShardInfo(job.path.name, len(members), size, sha256), members, unreadable)


def _write_sample(sample: Sample, job: ShardJob, shard: ShardFile, row: np.void) -> None:
    """Append the sample's members to the shard and fill in its row of the sidecar."""
    pictures = _pictures(sample, job)
    key, pid, camid = f"{sample.index:08d}", sample.record.pid, sample.camid
    row["shard"], row["index"], row["pid"], row["camid"] = job.position, sample.index, pid, camid
    for slot, data in sorted(pictures.items()):
        suffix = picture_suffix(slot, job.num_cameras)
        row["offset"][slot], row["length"][slot] = shard.add(key, suffix, data), len(data)
    text = json.dumps({"index": sample.index, "pid": pid, "camid": camid, "file": sample.record.file}).encode()
    row["json_offset"], row["json_length"] = shard.add(key, "json", text), len(text)


def _pictures(sample: Sample, job: ShardJob) -> dict[int, bytes]:
    """The sample's JPEG bytes by slot: the real picture at slot C, style copies at their camera's."""
    stored, image = _read(sample.record.path, job.max_size)
    pictures = {job.num_cameras: stored}
    if job.tables_CCKV is not None:
        others = [camid for camid in range(job.num_cameras) if camid != sample.camid]
        styled = in_styles(image, job.tables_CCKV[sample.camid], others)
        pictures |= {camid: encode(copy) for camid, copy in styled.items()}
    for camid, path in enumerate(sample.copies):
        if path is not None:
            pictures[camid] = _read(path, job.max_size)[0]
    return pictures


def _read(path: str, max_size: tuple[int, int] | None) -> tuple[bytes, Any]:
    try:
        data, image = as_stored(Path(path).read_bytes(), max_size)
    except (OSError, UnreadablePicture, ValueError, SystemError) as error:  # the last two: an empty picture
        raise UnreadablePicture(f"{path} ({error})") from error
    if min(image.size) < LEAST_SIDE:
        raise UnreadablePicture(f"{path} ({image.height} x {image.width} pixels, of which nothing can be cropped)")
    return data, image


def _plan_shards(
    dataset: Dataset,
    split: str,
    folder: Path,
    styles: Styles,
    shard_mib: float,
    min_shards: int,
    seed: int,
    max_size: tuple[int, int] | None,
) -> list[ShardJob]:
    """The split's samples in seeded random order, cut into shards of equal counts (plus or minus one)."""
    records = dataset.splits[split]
    copies = styles.copies if split == "train" else {}
    samples = [
        Sample(index, dataset.camids[record.camera], record, copies.get(record.file, ()))
        for index, record in enumerate(records)
    ]
    tables_CCKV = styles.tables_CCKV if split == "train" else None

    def job(position: int, rows: Sequence[int]) -> ShardJob:
        path = folder / f"{split}-{position:06d}.tar"
        return ShardJob(path, position, [samples[row] for row in rows], len(dataset.cameras), tables_CCKV, max_size)

    spaced = np.linspace(0, len(samples) - 1, min(MEASURED_SAMPLES, len(samples))).round().astype(int)
    expected_bytes = _sample_bytes(job(0, spaced.tolist())) * len(samples)
    count = max(min_shards, round(expected_bytes / (shard_mib * MIB)), 1)
    order = Draws(seed, split, "packing").permutation(len(samples), (0, 0, 0))
    parts = np.array_split(order, min(count, len(samples)))
    return [job(position, part.tolist()) for position, part in enumerate(parts)]


def _sample_bytes(job: ShardJob) -> float:
    """Bytes that a sample of the job takes in a tar, on the mean; some that cannot be read are no matter here."""
    sizes = []
    for sample in job.samples:
        try:
            pictures = _pictures(sample, job)
        except UnreadablePicture:
            continue
        sizes.append(sum(TAR_BLOCK + _padded(len(data)) for data in pictures.values()) + 2 * TAR_BLOCK)
    return float(np.mean(sizes)) if sizes else 0.0


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _describe_split(
    dataset: Dataset, split: str, folder: Path, shards: list[PackedShard], styles: Styles
) -> dict[str, Any]:
    """Write the split's sidecar; what index.json says of the split."""
    members = np.concatenate([shard.members for shard in shards])
    sidecar = folder / f"{split}.members.npy"
    np.save(sidecar, members, allow_pickle=False)
    with open(sidecar, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    identities = identities_in_order(record.pid for record in dataset.splits[split])
    return {
        "samples": len(members),
        "num_identities": len(identities),
        "identities": identities,  # label = position
        "unknown_identities": int((members["pid"] == UNKNOWN_PID).sum()),
        "camids": np.unique(members["camid"]).tolist(),
        "junk_dropped": dataset.junk[split],
        "distractors": dataset.distractors if split == "gallery" else 0,
        "missing_styles": styles.missing if split == "train" else None,
        "members": {"name": sidecar.name, "bytes": sidecar.stat().st_size, "sha256": sha256},
        "shards": [asdict(shard.info) for shard in shards],
    }


def _holds_shards(output: Path) -> list[Path]:
    """index.json first, so that a folder without its shards has no index either."""
    if not output.is_dir():
        return []
    index = [output / INDEX_NAME] if (output / INDEX_NAME).exists() else []
    return index + sorted(path for path in output.iterdir() if _OUR_FILES.fullmatch(path.name))


def check_output(output: Path, overwrite: bool) -> None:
    """`UserError` where the output is no folder, or holds shards that are not to be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder for the shards")
    if (held := _holds_shards(output)) and not overwrite:
        names = first_few(path.name for path in held)
        raise UserError(f"{output} already holds shards ({names}). Name another folder, or add --overwrite")


def _publish(unfinished: Path, output: Path, index: dict[str, Any]) -> None:
    """Move what was written into place, index.json last."""
    for path in _holds_shards(output):
        path.unlink()
    for path in sorted(unfinished.iterdir()):
        os.replace(path, output / path.name)
    text = unfinished / INDEX_NAME
    with open(text, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(text, output / INDEX_NAME)
