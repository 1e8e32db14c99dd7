"""Is a shard folder what its index says, down to every picture?"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecn_dist.data.fetch import fetch
from ecn_dist.data.index import UNKNOWN_PID, ShardIndex, ShardInfo, SplitIndex, is_url
from ecn_dist.data.pictures import UnreadablePicture, decode
from ecn_dist.errors import UserError
from ecn_dist.packing.records import SPLITS, first_few, identities_in_order, queries_without_match
from ecn_dist.packing.shards import picture_suffix
from ecn_dist.processes import Track, choose_workers, run_jobs, untracked

SHOWN_OF_A_SHARD = 3
Depth = Literal["sizes", "picture", "all"]


def validate(index: ShardIndex, *, workers: int | None = None, track: Track = untracked) -> list[str]:
    """What is wrong with the shard folder; empty where all is well.

    Every split to the depth "all" (see `check`), what index.json announces of it, a true match from another camera for
    every query, and no tar files beside the shards.
    """
    problems = [*_check_folder(index), *_check_queries(index)]
    for split in index.splits.values():
        problems += _check_announced(split, index)
        problems += check(split, "all", workers=workers, track=track)
    return problems


def check(split: SplitIndex, depth: Depth, *, workers: int | None = 1, track: Track = untracked) -> list[str]:
    """Is the split what its index says? What is wrong with it; empty where all is well.

    Args:
        depth: "sizes": every local shard is there, may be read and has its size; nothing is read. "picture": and one
            picture of each local shard can be decoded. "all": the sidecar's rows fit each other, and in every shard the
            checksum, every member where the sidecar says, every picture decoded, every KEY.json equal to its row.
        workers: processes, for "all".
    """
    if depth != "all":
        if is_url(split.folder):
            return []
        paths = [split.shard_path(position) for position in range(len(split.shards))]
        problems = [_check_size(path, info) for path, info in zip(paths, split.shards, strict=True)]
        if depth == "picture" and not any(problems):
            problems = [_check_a_picture(split, position) for position in range(len(paths))]
        return [problem for problem in problems if problem]
    first = np.cumsum([0, *(info.samples for info in split.shards)])
    jobs = [
        _ShardJob(split.shard_path(position), info, np.array(split.members[start : start + info.samples]))
        for position, (info, start) in enumerate(zip(split.shards, first[:-1], strict=True))
    ]
    processes = choose_workers(workers, int(np.count_nonzero(split.members["length"])))
    found = run_jobs(_check_shard, jobs, processes, f"{split.name} shards", track)
    return [*_check_rows(split), *(problem for problems in found for problem in problems)]


def _check_rows(split: SplitIndex) -> Iterator[str]:
    members, camids = split.members, split.camids
    if not np.array_equal(np.sort(split.indices), np.arange(len(split))):
        yield f"{split.name}: the indices are not 0..{len(split) - 1}, each once"
    if not np.array_equal(members["shard"], np.repeat(np.arange(len(split.shards)), [s.samples for s in split.shards])):
        yield f"{split.name}: the sidecar's rows are not in the order of the shards"
    inside = (camids >= 0) & (camids < split.num_cameras)
    if not inside.all():
        yield f"{split.name}: cameras outside 0..{split.num_cameras - 1}: {first_few(np.unique(camids[~inside]))}"
    if split.name != "train" and (split.pids == UNKNOWN_PID).any():
        yield f"{split.name}: {np.count_nonzero(split.pids == UNKNOWN_PID)} pictures without identity"
    identities = identities_in_order(split.pids[np.argsort(split.indices)].tolist())
    if sorted(identities) != sorted(split.identities):
        yield f"{split.name}: the identities in index.json are not those of the pictures"
    elif identities != list(split.identities):
        yield f"{split.name}: the identities in index.json are not in the order of their first appearance"
    if without := np.count_nonzero(members["length"][:, -1] == 0):
        yield f"{split.name}: {without} samples without a picture"
    if (members["length"][inside, camids[inside]] != 0).any():
        yield f"{split.name}: samples with a style copy of their own camera"


def _check_announced(split: SplitIndex, index: ShardIndex) -> Iterator[str]:
    about = index.about["splits"][split.name]
    found = {
        "samples": len(split),
        "num_identities": len(np.unique(split.pids[split.pids != UNKNOWN_PID])),
        "camids": np.unique(split.camids).tolist(),
    }
    for name, value in found.items():
        if about.get(name) != value:
            yield f"{split.name}: index.json says {name} {about.get(name)!r}, and the pictures' are {value!r}"
    copies = int(np.count_nonzero(split.members["length"][:, : split.num_cameras]))
    if split.missing_styles and (copies or about.get("missing_styles") not in (None, split.missing_styles)):
        yield f"{split.name}: {split.missing_styles} of {copies + split.missing_styles} style copies are missing"


def _check_queries(index: ShardIndex) -> Iterator[str]:
    if not {"query", "gallery"} <= set(index.splits):
        if set(index.splits) & {"query", "gallery"}:
            yield f"query and gallery go together; the splits are {', '.join(index.splits)}"
        return
    query, gallery = index.splits["query"], index.splits["gallery"]
    without = queries_without_match(
        query.pids, query.camids, gallery.pids, gallery.camids, num_cameras=index.num_cameras
    )
    if without.any():
        pairs = zip(query.pids[without], query.camids[without], strict=True)
        some = first_few(f"pid {pid} camid {camid}" for pid, camid in pairs)
        yield f"query: {without.sum()} of {len(query)} have no true match from another camera in the gallery: {some}"


def _check_folder(index: ShardIndex) -> Iterator[str]:
    """Splits and cameras that cannot be, and tar files beside the shards, which a glob over the folder would read."""
    if unknown := sorted(set(index.splits) - set(SPLITS)):
        yield f"unknown splits: {first_few(unknown)}"
    if len(index.cameras) != index.num_cameras:
        yield f"index.json names {len(index.cameras)} cameras, and says that there are {index.num_cameras}"
    if is_url(index.folder):
        return
    names = {shard.name for split in index.splits.values() for shard in split.shards}
    strays = sorted(path.name for path in Path(index.folder).glob("*.tar") if path.name not in names)
    if strays:
        yield f"{len(strays)} tar files are not in index.json: {first_few(strays)}"


def _check_size(path: str, info: ShardInfo) -> str | None:
    try:
        if not os.path.isfile(path):
            return f"{path} is no file" if os.path.exists(path) else f"{path} is missing"
        with open(path, "rb") as file:  # one that may not be read has a size, too
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return f"{path} has {size} bytes, and was packed with {info.bytes}" if size != info.bytes else None


def _check_a_picture(split: SplitIndex, position: int) -> str | None:
    """The last one of a shard, which the end of a copy that was cut short would lack."""
    last = sum(info.samples for info in split.shards[: position + 1]) - 1
    offset, length = (int(split.members[field][last, -1]) for field in ("offset", "length"))
    try:
        with open(split.shard_path(position), "rb") as file:
            file.seek(offset)
            decode(file.read(length))
    except (OSError, UnreadablePicture) as error:
        return f"{split.shard_path(position)}: a picture cannot be read ({error})"
    return None


@dataclass(frozen=True)
class _ShardJob:
    """One shard to check against its rows of the sidecar."""

    path: str
    info: ShardInfo
    members: np.ndarray


def _check_shard(job: _ShardJob) -> list[str]:
    """What is wrong with one shard. Reads it whole, once for the checksum and once for the members."""
    if not is_url(job.path) and (problem := _check_size(job.path, job.info)):
        return [problem]
    problems: list[str] = []
    try:
        with _opened(job.path, job.info.bytes) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != job.info.sha256:
                was = f"sha256 {job.info.sha256[:12]}... then, {sha256[:12]}... now"
                problems.append(f"{job.path} has changed since it was packed: {was}")
            problems += _check_members(job, file)
    except UserError as error:
        problems.append(str(error))
    except Exception as error:  # a damaged archive makes tarfile raise almost anything
        problems.append(f"{job.path} cannot be read: {type(error).__name__}: {error}")
    shown = problems[:SHOWN_OF_A_SHARD]
    return shown + [f"{job.path}: {len(problems) - len(shown)} more problems"] * (len(problems) > len(shown))


@contextmanager
def _opened(path: str, announced: int) -> Iterator[BufferedIOBase]:
    """The file itself; from a URL a temporary copy of it, of the announced bytes at most."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:

        def receive(chunks: Iterator[bytes]) -> None:
            copy.seek(0)
            copy.truncate()
            for chunk in chunks:
                copy.write(chunk)
                if copy.tell() > announced:
                    raise UserError(f"{path} has more than the {announced} bytes that it was packed with")

        fetch(path, receive)
        copy.seek(0)
        yield copy


def _check_members(job: _ShardJob, file: BufferedIOBase) -> Iterator[str]:
    """Each member of the tar as tarfile finds it, against what the sidecar says."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        found = {member.name: (member.offset_data, member.size) for member in tar}
    expected: set[str] = set()
    for row in job.members:
        key = f"{row['index']:08d}"
        text = {"index": int(row["index"]), "pid": int(row["pid"]), "camid": int(row["camid"])}
        slots = [(f"{key}.json", int(row["json_offset"]), int(row["json_length"]))]
        num_cameras = len(row["offset"]) - 1
        for slot, (offset, length) in enumerate(zip(row["offset"].tolist(), row["length"].tolist(), strict=True)):
            if length:
                slots.append((f"{key}.{picture_suffix(slot, num_cameras)}", offset, length))
        for name, offset, length in slots:
            expected.add(name)
            if found.get(name) != (offset, length):
                yield f"{job.path}: {name} is not at byte {offset} with {length} bytes, as the sidecar says"
                continue
            file.seek(offset)
            if problem := _check_content(file.read(length), text if name.endswith(".json") else None):
                yield f"{job.path}: {name} {problem}"
    if strays := sorted(set(found) - expected):
        yield f"{job.path} holds members that the sidecar does not know: {first_few(strays)}"


def _check_content(data: bytes, expected: dict[str, Any] | None) -> str | None:
    """What is wrong with a picture, or with a KEY.json that should say `expected`."""
    try:
        if expected is None:
            decode(data)
            return None
        about = json.loads(data)
    except (UnreadablePicture, ValueError) as error:
        return f"cannot be read ({error})"
    if not isinstance(about, dict) or not isinstance(about.get("file"), str):
        return "lacks the original file name"
    different = [name for name, value in expected.items() if about.get(name) != value]
    return f"differs from the sidecar in {first_few(different)}" if different else None
