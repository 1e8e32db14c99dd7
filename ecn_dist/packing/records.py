"""What a data set holds, whatever its folder looks like: pictures with identity and camera, by split."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from ecn_dist.data.index_gate import SPLIT_NAMES, UNKNOWN_PID
from ecn_dist.errors import UserError

SHOWN = 5  # how many offenders an error names
Seen = tuple[int, int]  # pid and camid of a picture


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a split."""

    file: str  # its name in the split (a path with / where the split has folders): sorts the pictures, and is kept
    path: str  # where to read it
    pid: int
    camera: str  # the camera's name or number in the data set


@dataclass(frozen=True)
class Dataset:
    """A data set's pictures, each split sorted by file name."""

    layout: str
    root: Path
    splits: Mapping[str, tuple[Record, ...]]  # in the order of SPLIT_NAMES; splits that do not exist are absent
    cameras: tuple[str, ...]  # of all splits: camid = position
    junk: Mapping[str, int]  # pictures with pid -1 that were dropped, by split
    distractors: int = 0  # gallery pictures of people who are no query
    ignored: tuple[str, ...] = ()  # files that are no pictures
    styles_folder: Path | None = None  # style copies that the data set ships

    @cached_property
    def camids(self) -> dict[str, int]:
        """By the camera's name."""
        return {camera: camid for camid, camera in enumerate(self.cameras)}


def first_few(items: Iterable[object]) -> str:
    """The first items and how many more there are, for an error text."""
    listed = list(map(str, items))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def refuse_unreadable(names: list[str]) -> None:
    """`UserError` where there are names of pictures that cannot be read."""
    if names:
        raise UserError(f"{len(names)} pictures cannot be read: {first_few(names)}. Replace or remove them")


def collect(
    layout: str, root: Path, splits: Mapping[str, Iterable[Record]], ignored: Iterable[str], styles_folder: Path | None
) -> Dataset:
    """Sort, drop junk, number the cameras and check what every data set must fulfil.

    Pictures with pid -1 are junk and dropped, except in the training split of layout folder: there they are pictures
    whose identity nobody knows, which a target may hold. Cameras are numbered from 0 in the order of their numbers, or
    of their names where they are not numbers. Raises `UserError` where a split is left without pictures or has two of
    one name, or no split can be used.
    """
    kept: dict[str, tuple[Record, ...]] = {}
    junk: dict[str, int] = {}
    for split in SPLIT_NAMES:
        if split not in splits:
            continue
        records = sorted(splits[split], key=lambda record: record.file)
        names = [record.file for record in records]
        if twice := [name for name, following in pairwise(names) if name == following]:
            raise UserError(f"split {split!r} of {root} names pictures more than once: {first_few(twice)}")
        if (layout, split) != ("folder", "train"):
            records = [record for record in records if record.pid != UNKNOWN_PID]
        junk[split] = len(names) - len(records)
        if not records:
            dropped = f" (all {len(names)} of its pictures have pid -1, which is junk)" if names else ""
            raise UserError(
                f"split {split!r} of {root} has no pictures with an identity{dropped}. Remove its folder if the data "
                "set has no such split; pictures of unknown people can only be a training split, of layout folder"
            )
        kept[split] = tuple(records)
    if not kept or ("query" in kept) != ("gallery" in kept):
        there = ", ".join(kept) or "none"
        raise UserError(f"{root} must hold train, or query and gallery, or all three; splits found: {there}")
    names_of_cameras = {record.camera for records in kept.values() for record in records}
    numbers = sorted((name for name in names_of_cameras if name.isdecimal()), key=int)
    cameras = (*numbers, *sorted(names_of_cameras.difference(numbers)))
    is_distractor = [layout == "market" and record.pid == 0 for record in kept.get("gallery", ())]
    return Dataset(layout, root, kept, cameras, junk, sum(is_distractor), tuple(ignored), styles_folder)


def identities_in_order(pids: Iterable[int]) -> list[int]:
    """The known pids in the order of their first appearance."""
    return [pid for pid in dict.fromkeys(pids) if pid != UNKNOWN_PID]


def check_queries(dataset: Dataset) -> int:
    """How many queries have no true match; `UserError` where none has one."""
    if "query" not in dataset.splits:
        return 0
    query, gallery = ([(r.pid, dataset.camids[r.camera]) for r in dataset.splits[of]] for of in ("query", "gallery"))
    without = queries_without_match(query, gallery, len(dataset.cameras))
    if len(without) == len(query):
        raise UserError(
            f"none of the {len(without)} queries of {dataset.root} has a picture of the person from another camera "
            "in the gallery (with one camera: any). Check that both belong together, and how pid and camera are read"
        )
    return len(without)


def queries_without_match(query: Sequence[Seen], gallery: Sequence[Seen], num_cameras: int) -> list[Seen]:
    """The queries of whose person the gallery has no picture from another camera.

    With one camera, which is how data without cameras are packed: no picture at all.
    """
    # A person is there from another camera where the gallery's pictures of it outnumber those from the query's camera.
    people, pairs = Counter(pid for pid, _ in gallery), Counter(gallery if num_cameras > 1 else ())
    return [(pid, camid) for pid, camid in query if people[pid] == pairs[pid, camid]]
