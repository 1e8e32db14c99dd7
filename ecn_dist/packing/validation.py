"""Is a shard folder what its index says, down to every picture?"""

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ecn_dist.data.fetch import fetch
from ecn_dist.data.index import UNKNOWN_PID, ShardIndex, ShardInfo, SplitIndex, is_url
from ecn_dist.data.jpeg import UnreadablePicture, decode
from ecn_dist.errors import UserError
from ecn_dist.packing.records import SPLITS, first_few, queries_without_match
from ecn_dist.processes import Track, choose_workers, run_jobs, untracked

MIB = 2**20
SHOWN_OF_A_SHARD = 3


@dataclass(frozen=True)
class ShardCheck:
    """One shard to check against its rows of the sidecar."""

    split: str
    path: str
    info: ShardInfo
    members: np.ndarray
    num_cameras: int


def validate(index: ShardIndex, *, workers: int | None = None, track: Track = untracked) -> list[str]:
    """What is wrong with the shard folder; empty where all is well.

    Every shard's size and checksum, every member where the sidecar says, every picture decoded, every KEY.json equal
    to its row; indices 0..n-1 each once, identities and cameras as announced, a true match from another camera for
    every query, all style copies or none.
    """
    problems = [problem for split in index.splits.values() for problem in _check_split(split, index)]
    problems += _check_queries(index)
    problems += _check_folder(index)
    jobs = [job for split in index.splits.values() for job in _shard_checks(split)]
    pictures = sum(int(np.count_nonzero(job.members["length"])) for job in jobs)
    for found in run_jobs(check_shard, jobs, choose_workers(workers, pictures), "shards", track):
        problems += found
    return problems


def print_summary(index: ShardIndex) -> None:
    """Print the table that re-ID papers show of a data set, with what the shards add."""
    columns = ("split", "ids", "images", "cameras", "shards", "MiB", "style copies")
    table = Table(title=Text(f"{index.folder} ({index.layout}, {index.num_cameras} cameras)"))
    notes = []
    for name in columns:
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in index.splits.items():
        about = index.about["splits"][name]
        distractors = about.get("distractors", 0)
        copies = np.count_nonzero(split.members["length"][:, : index.num_cameras])
        row = (
            split.num_identities - bool(distractors),
            len(split),
            len(np.unique(split.camids)),
            len(split.shards),
            f"{sum(shard.bytes for shard in split.shards) / MIB:.1f}",
            copies,
        )
        table.add_row(name, *map(str, row))
        counts = {
            "distractors": distractors,
            "junk dropped": about.get("junk_dropped"),
            "of unknown identity": np.count_nonzero(split.pids == UNKNOWN_PID),
            "style copies missing": split.missing_styles if copies else 0,
        }
        if noted := [f"{count} {what}" for what, count in counts.items() if count]:
            notes.append(f"{name}: {', '.join(noted)}")
    Console().print(table)
    print(*notes, sep="\n", end="\n" if notes else "")


def _check_split(split: SplitIndex, index: ShardIndex) -> Iterator[str]:
    members, camids = split.members, split.camids
    if not np.array_equal(np.sort(split.indices), np.arange(len(split))):
        yield f"{split.name}: the indices are not 0..{len(split) - 1}, each once"
    if not np.array_equal(members["shard"], np.repeat(np.arange(len(split.shards)), [s.samples for s in split.shards])):
        yield f"{split.name}: the sidecar's rows are not in the order of the shards"
    if outside := sorted(set(camids[(camids < 0) | (camids >= split.num_cameras)].tolist())):
        yield f"{split.name}: cameras outside 0..{split.num_cameras - 1}: {first_few(outside)}"
    pids = set(split.pids.tolist())
    if split.name != "train" and UNKNOWN_PID in pids:
        yield f"{split.name}: {np.count_nonzero(split.pids == UNKNOWN_PID)} pictures without identity"
    if pids - {UNKNOWN_PID} != set(split.identities) or len(set(split.identities)) != len(split.identities):
        yield f"{split.name}: the identities in index.json are not those of the pictures"
    elif split.pids[np.argsort(split.indices)].tolist() and _first_appearances(split) != list(split.identities):
        yield f"{split.name}: the identities in index.json are not in the order of their first appearance"
    if (members["length"][:, -1] == 0).any():
        yield f"{split.name}: {np.count_nonzero(members['length'][:, -1] == 0)} samples without a picture"
    copies = int(np.count_nonzero(members["length"][:, : split.num_cameras]))
    announced = index.about["splits"][split.name].get("missing_styles")
    if split.missing_styles and (copies or announced not in (None, split.missing_styles)):
        yield f"{split.name}: {split.missing_styles} of {copies + split.missing_styles} style copies are missing"
    inside = (camids >= 0) & (camids < split.num_cameras)
    if (members["length"][inside, camids[inside]] != 0).any():
        yield f"{split.name}: samples with a style copy of their own camera"


def _first_appearances(split: SplitIndex) -> list[int]:
    in_file_order = split.pids[np.argsort(split.indices)]
    known = in_file_order[in_file_order != UNKNOWN_PID]
    values, first = np.unique(known, return_index=True)
    return values[np.argsort(first)].tolist()


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


def _shard_checks(split: SplitIndex) -> Iterator[ShardCheck]:
    first = 0
    for position, info in enumerate(split.shards):
        rows = np.array(split.members[first : first + info.samples])
        first += info.samples
        yield ShardCheck(split.name, split.shard_path(position), info, rows, split.num_cameras)


def check_shard(job: ShardCheck) -> list[str]:
    """What is wrong with one shard. Reads it whole, once for the checksum and once for the members."""
    problems: list[str] = []
    try:
        with _opened(job.path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if (size, sha256) != (job.info.bytes, job.info.sha256):
                problems.append(
                    f"{job.path} has changed since it was packed: {size} bytes, sha256 {sha256[:12]}...; "
                    f"{job.info.bytes} bytes, sha256 {job.info.sha256[:12]}... were written"
                )
            file.seek(0)
            problems += _check_members(job, file)
    except FileNotFoundError:
        return [f"{job.path} is missing"]
    except UserError as error:
        return [str(error)]
    except Exception as error:  # a damaged archive makes tarfile raise almost anything
        problems.append(f"{job.path} cannot be read: {type(error).__name__}: {error}")
    shown = problems[:SHOWN_OF_A_SHARD]
    return shown + [f"{job.path}: {len(problems) - len(shown)} more problems"] * (len(problems) > len(shown))


@contextmanager
def _opened(path: str) -> Iterator[BufferedIOBase]:
    """The file itself; from a URL a temporary copy of it."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:

        def receive(chunks: Iterator[bytes]) -> None:
            copy.seek(0)
            copy.truncate()
            copy.writelines(chunks)

        fetch(path, receive)
        yield copy


def _check_members(job: ShardCheck, file: BufferedIOBase) -> Iterator[str]:
    """Each member of the tar as tarfile finds it, against what the sidecar says."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        found = {member.name: (member.offset_data, member.size) for member in tar}
    expected: set[str] = set()
    for row in job.members:
        key = f"{row['index']:08d}"
        text = {"index": int(row["index"]), "pid": int(row["pid"]), "camid": int(row["camid"])}
        slots = [(f"{key}.json", int(row["json_offset"]), int(row["json_length"]))]
        for slot, (offset, length) in enumerate(zip(row["offset"].tolist(), row["length"].tolist(), strict=True)):
            if length:
                suffix = "jpg" if slot == job.num_cameras else f"cam{slot:02d}.jpg"
                slots.append((f"{key}.{suffix}", offset, length))
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
