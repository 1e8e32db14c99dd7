"""Is a shard folder what its index says, down to every picture? And its summary, as re-ID papers show it."""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ecn_dist.data.fetch import fetch
from ecn_dist.data.index import UNKNOWN_PID, ShardIndex, ShardInfo, SplitIndex, is_url
from ecn_dist.data.pictures import UnreadablePicture, decode
from ecn_dist.errors import UserError, printable
from ecn_dist.packing.records import first_few, identities_in_order, queries_without_match
from ecn_dist.packing.shards import picture_suffix
from ecn_dist.processes import choose_workers, run_jobs

SHOWN_OF_A_SHARD = 3
_ShardJob = tuple[str, ShardInfo, np.ndarray]  # path or URL, what the index says of it, its rows of the sidecar


def validate(index: ShardIndex, *, workers: int | None = None) -> list[str]:
    """What is wrong with the shard folder; empty where all is well.

    That the sidecars' rows fit each other and what index.json announces; that each shard has its checksum, every member
    where the sidecar says, every picture decoded, every KEY.json equal to its row; a true match from another camera for
    every query; and no tar files beside the shards.
    """
    problems = [*_check_strays(index), *_check_queries(index)]
    for split in index.splits.values():
        parts = np.split(np.array(split.members), np.cumsum(split.shard_samples)[:-1])
        jobs = [(split.shard_path(at), *job) for at, job in enumerate(zip(split.shards, parts, strict=True))]
        processes = choose_workers(workers, int(np.count_nonzero(split.members["length"])))
        found = run_jobs(_check_shard, jobs, processes, f"{split.name} shards")
        problems += [*_check_rows(split, index), *chain(*found)]
    return problems


def _check_rows(split: SplitIndex, index: ShardIndex) -> Iterator[str]:
    members, camids, about = split.members, split.camids, index.about["splits"][split.name]
    for key, value in {
        "samples": len(split),
        "num_identities": len(np.unique(split.pids[split.pids != UNKNOWN_PID])),
        "camids": np.unique(camids).tolist(),
    }.items():
        if about.get(key) != value:
            yield f"{split.name}: index.json says {key} {about.get(key)!r}, and the pictures' are {value!r}"
    copies = int(np.count_nonzero(members["length"][:, : split.num_cameras]))
    if split.missing_styles > 0 and (copies or about.get("missing_styles") not in (None, split.missing_styles)):
        yield f"{split.name}: {split.missing_styles} of {copies + split.missing_styles} style copies are missing"
    if not np.array_equal(np.sort(split.indices), np.arange(len(split))):
        yield f"{split.name}: the indices are not 0..{len(split) - 1}, each once"
    if not np.array_equal(members["shard"], np.repeat(np.arange(len(split.shards)), split.shard_samples)):
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


def _check_queries(index: ShardIndex) -> Iterator[str]:
    if not {"query", "gallery"} <= set(index.splits):
        if set(index.splits) & {"query", "gallery"}:
            yield f"query and gallery go together; the splits are {', '.join(index.splits)}"
        return
    query, gallery = (
        [*zip(split.pids.tolist(), split.camids.tolist(), strict=True)]
        for split in (index.splits["query"], index.splits["gallery"])
    )
    if without := queries_without_match(query, gallery, index.num_cameras):
        some = first_few(f"pid {pid} camid {camid}" for pid, camid in without)
        yield f"query: {len(without)} of {len(query)} have no true match from another camera in the gallery: {some}"


def _check_strays(index: ShardIndex) -> Iterator[str]:
    """Tar files beside the shards, which a glob over the folder would read."""
    if not is_url(index.folder):
        names = {shard.name for split in index.splits.values() for shard in split.shards}
        if strays := sorted({path.name for path in Path(index.folder).glob("*.tar")} - names):
            yield f"{len(strays)} tar files are not in index.json: {first_few(strays)}"


def _check_shard(job: _ShardJob) -> list[str]:
    """What is wrong with one shard. Reads it whole, once for the checksum and once for the members."""
    path, info, members = job
    remote = is_url(path)
    if not remote and not os.path.isfile(path):
        return [f"{path} is no file" if os.path.exists(path) else f"{path} is missing"]
    if not remote and (size := os.path.getsize(path)) != info.bytes:
        return [f"{path} has {size} bytes, and was packed with {info.bytes}"]
    problems: list[str] = []
    try:
        with tempfile.TemporaryFile() if remote else open(path, "rb") as file:
            if remote:
                fetch(path, partial(_receive, file, path, info.bytes))
                file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != info.sha256:
                was = f"sha256 {info.sha256[:12]}... then, {sha256[:12]}... now"
                problems.append(f"{path} has changed since it was packed: {was}")
            problems += _check_members(path, members, file)
    except UserError as error:
        problems.append(str(error))
    except Exception as error:  # a damaged archive makes tarfile raise almost anything
        problems.append(f"{path} cannot be read: {type(error).__name__}: {error}")
    shown = problems[:SHOWN_OF_A_SHARD]
    return shown + [f"{path}: {len(problems) - len(shown)} more problems"] * (len(problems) > len(shown))


def _receive(file: IO[bytes], path: str, announced: int, chunks: Iterator[bytes]) -> None:
    file.seek(0)
    file.truncate()
    for chunk in chunks:
        file.write(chunk)
        if file.tell() > announced:  # a source that does so will again: no attempt more
            raise UserError(f"{path} has more than the {announced} bytes that it was packed with")


def _check_members(path: str, members: np.ndarray, file: IO[bytes]) -> Iterator[str]:
    """Each member of the tar as tarfile finds it, against what the sidecar says."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        found = {}
        for member in tar:
            if member.size < 0:  # which older Pythons follow backwards, without end
                raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
            found[member.name] = (member.offset_data, member.size)
    for row in members:
        key, num_cameras = f"{row['index']:08d}", len(row["offset"]) - 1
        expected = {f"{key}.json": (int(row["json_offset"]), int(row["json_length"]))}
        for slot, (offset, length) in enumerate(zip(row["offset"].tolist(), row["length"].tolist(), strict=True)):
            if length:
                expected[f"{key}.{picture_suffix(slot, num_cameras)}"] = offset, length
        for name, (offset, length) in expected.items():
            if found.pop(name, None) != (offset, length):
                yield f"{path}: {name} is not at byte {offset} with {length} bytes, as the sidecar says"
                continue
            file.seek(offset)
            if problem := _check_content(file.read(length), row if name.endswith(".json") else None):
                yield f"{path}: {name} {problem}"
    if found:
        yield f"{path} holds members that the sidecar does not know: {first_few(sorted(found))}"


def _check_content(data: bytes, row: np.void | None) -> str | None:
    """What is wrong with a picture, or with a KEY.json that should say what its `row` does."""
    try:
        if row is None:
            decode(data)
            return None
        about = json.loads(data)
    except (UnreadablePicture, ValueError) as error:
        return f"cannot be read ({error})"
    if not isinstance(about, dict) or not isinstance(about.get("file"), str):
        return "lacks the original file name"
    different = [name for name in ("index", "pid", "camid") if about.get(name) != int(row[name])]
    return f"differs from the sidecar in {first_few(different)}" if different else None


def print_summary(index: ShardIndex) -> None:
    """Print identities, images, cameras, shards and style copies of each split, and what was dropped."""
    table = Table("split", title=Text(printable(f"{index.folder} ({index.layout}, {index.num_cameras} cameras)")))
    for name in ("ids", "images", "cameras", "shards", "MiB", "style copies"):
        table.add_column(name, justify="right")
    notes = []
    for name, split in index.splits.items():
        about, shown = index.about["splits"][name], printable(name)
        distractors = about.get("distractors", 0)
        copies = np.count_nonzero(split.members["length"][:, : index.num_cameras])
        mib = f"{sum(shard.bytes for shard in split.shards) / 2**20:.1f}"
        ids, cameras = split.num_identities - bool(distractors), len(np.unique(split.camids))
        table.add_row(Text(shown), *map(str, (ids, len(split), cameras, len(split.shards), mib, copies)))
        counts = {
            "distractors": distractors,
            "junk dropped": about.get("junk_dropped"),
            "of unknown identity": np.count_nonzero(split.pids == UNKNOWN_PID),
            "style copies missing": split.missing_styles if copies else 0,
        }
        if noted := [f"{count} {what}" for what, count in counts.items() if count]:
            notes.append(f"{shown}: {', '.join(noted)}")
    Console().print(table)
    print(*notes, sep="\n", end="\n" if notes else "")
