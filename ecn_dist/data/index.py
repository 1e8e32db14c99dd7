"""The index of a shard folder: what is in it, and at which byte of which shard.

`index.json` describes the folder; beside it each split has a sidecar `{split}.members.npy` with one row per sample, in
shard order and in tar order inside a shard (`member_dtype`), which is memory-mapped. C cameras of the folder.
"""

import hashlib
import os
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ecn_dist.data.fetch import PATIENCE, Patience, fetch_bytes, shown
from ecn_dist.data.index_gate import MAX_INDEX_BYTES, REMEDY, UNKNOWN_PID, damage, parse_index
from ecn_dist.data.pictures import MAX_BYTES
from ecn_dist.errors import UserError

INDEX_NAME = "index.json"
NPY_HEADER_BYTES = 4096  # at most


def member_dtype(num_cameras: int) -> np.dtype:
    """One row of a sidecar. Slot c < C of `offset` and `length` is camera c's style copy, slot C the real picture."""
    return np.dtype(
        [
            ("shard", "<i4"),  # position in the split's list of shards
            ("index", "<i8"),  # 0..n-1 within the split: the exemplar index
            ("pid", "<i8"),
            ("camid", "<i4"),  # from 0
            ("offset", "<i8", (num_cameras + 1,)),  # of the member's data, in bytes from the start of the tar
            ("length", "<i4", (num_cameras + 1,)),  # in bytes; 0: no such member
            ("json_offset", "<i8"),
            ("json_length", "<i4"),
        ]
    )


def is_url(folder: str) -> bool:
    """Whether `folder` is an address (`https://...`, `pipe:...`) rather than a local folder."""
    return "://" in folder or folder.startswith("pipe:")


def location(folder: str, name: str) -> str:
    """Path or URL of the file `name`. A URL may say where the name goes: `pipe:aws s3 cp s3://bucket/market/{} -`."""
    if is_url(folder) and "{}" in folder:
        return folder.replace("{}", name)
    return f"{folder.rstrip('/')}/{name}"


def _column(name: str) -> cached_property[np.ndarray]:
    return cached_property(lambda split: split.members[name].astype(np.int64))


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a split, as it was when it was packed."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(eq=False)
class SplitIndex:
    """The samples of one split. Pickles small: a memory-mapped sidecar is mapped again, not copied."""

    name: str
    folder: str  # path or URL prefix
    shards: tuple[ShardInfo, ...]
    members: np.ndarray  # structured, `member_dtype(num_cameras)`
    num_cameras: int
    identities: tuple[int, ...]  # pids in the order of first appearance in the sorted file list: label = position

    def __len__(self) -> int:
        return len(self.members)

    # (n,) int64 each.
    pids = _column("pid")  # as in the data set; -1 where unknown (in the training split only)
    camids = _column("camid")  # from 0
    indices = _column("index")  # each of 0..n-1 once: the exemplar index

    @cached_property
    def labels(self) -> np.ndarray:
        """(n,) int64, position of the pid in `identities`. `UserError` where a picture has no known identity."""
        unknown = int((self.pids == UNKNOWN_PID).sum())
        if unknown:
            raise UserError(
                f"{unknown} of the {len(self)} pictures of split {self.name!r} in {shown(self.folder)} have no "
                "identity: it can be a target, but not a source. Name a labelled shard folder instead"
            )
        identities = np.asarray(self.identities, dtype=np.int64)
        order = np.argsort(identities, kind="stable")
        return order[np.searchsorted(identities, self.pids, sorter=order)].astype(np.int64)

    @property
    def shard_samples(self) -> list[int]:
        return [shard.samples for shard in self.shards]

    @property
    def num_identities(self) -> int:
        """How many there are; unknown ones do not count."""
        return len(self.identities)

    @cached_property
    def missing_styles(self) -> int:
        """How many style copies the split lacks, of one for each sample and each of the C - 1 other cameras."""
        return len(self) * (self.num_cameras - 1) - int(np.count_nonzero(self.members["length"][:, :-1]))

    @property
    def has_styles(self) -> bool:
        return self.missing_styles == 0

    def shard_path(self, shard: int) -> str:
        """Path or URL of a shard, by its position in `shards`."""
        return location(self.folder, self.shards[shard].name)

    def check(self) -> None:
        """`UserError` where a row of the sidecar cannot be what pack wrote; it names the column."""
        where = shown(location(self.folder, f"{self.name}.members.npy"))
        pids = np.array([*self.identities, *[UNKNOWN_PID] * (self.name == "train")], dtype=np.int64)
        fewest = np.arange(self.num_cameras + 1) == self.num_cameras  # a copy may be missing, the picture may not
        seen, start = np.zeros(len(self), dtype=bool), 0
        for number, shard in enumerate(self.shards):  # so that ten million rows need little memory
            rows = self.members[start : start + shard.samples]
            longest = min(shard.bytes, MAX_BYTES)
            ranges = {
                "shard": (number, number),
                "index": (0, len(self) - 1),
                "camid": (0, self.num_cameras - 1),
                "length": (fewest, longest),
                "offset": (0, shard.bytes - rows["length"].astype(np.int64)),
                "json_length": (0, longest),
                "json_offset": (0, shard.bytes - rows["json_length"].astype(np.int64)),
            }
            wrong = {name: (rows[name] < least) | (rows[name] > most) for name, (least, most) in ranges.items()}
            wrong["offset"] &= rows["length"] > 0  # of a copy that is not there nothing is read
            own = np.arange(len(rows)), rows["camid"].clip(0, self.num_cameras - 1)
            wrong["length"][own] |= rows["length"][own] > 0  # of the picture's own camera there is no copy
            wrong["pid"] = ~np.isin(rows["pid"], pids)
            for column, is_wrong in wrong.items():
                if is_wrong.any():
                    row = int(np.nonzero(is_wrong)[0][0])
                    value = reprlib.repr(rows[column][row].tolist())
                    raise damage(where, f"{column} of sample {start + row}", f"is {value}")
            seen[rows["index"]] = True
            start += shard.samples
        if not seen.all():
            raise damage(where, "index", f"is not 0 .. {len(self) - 1}, each once")

    def __getstate__(self) -> dict[str, Any]:
        state = {name: self.__dict__[name] for name in self.__dataclass_fields__}
        if isinstance(self.members, np.memmap):
            state["members"] = Path(str(self.members.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["members"], Path):
            state["members"] = np.load(state["members"], mmap_mode="r", allow_pickle=False)
        self.__dict__.update(state)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A shard folder's `index.json`, read and checked."""

    folder: str  # path or URL prefix
    layout: str
    num_cameras: int
    cameras: tuple[str, ...]  # camera names of the data set: camid = position
    splits: dict[str, SplitIndex]
    about: dict[str, Any] = field(default_factory=dict)  # all of index.json, as parsed
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, folder: str, patience: Patience = PATIENCE) -> "ShardIndex":
        """Read `index.json`, which must be what pack writes, and map the sidecars, whose size and checksum are checked.

        `folder` is a path, or the prefix of URLs (see `location`). Shards are not touched; `split` checks a sidecar's
        rows. Raises `UserError` where folder, index or a sidecar is missing, of another version, not what was packed,
        or cannot be fetched.
        """
        output = "shards/NAME" if is_url(folder) else folder
        how_to_pack = f"Pack a data set first: python -m ecn_dist.pack --layout market --input FOLDER --output {output}"
        data = _read_index(folder, how_to_pack, patience)
        index = parse_index(data, shown(location(folder, INDEX_NAME)), how_to_pack)
        num_cameras, announced = index["num_cameras"], index["splits"].items()
        splits = {name: _load_split(name, folder, num_cameras, split, patience) for name, split in announced}
        return cls(folder, index["layout"], num_cameras, tuple(index["cameras"]), splits, index)

    def split(self, name: str) -> SplitIndex:
        """The split's index, its rows checked (`splits` has those that were not, for who wants to tell all problems).

        Raises `UserError` where there is no such split, or a row of its sidecar cannot be.
        """
        if name not in self.splits:
            raise UserError(f"no split {name!r} in {shown(self.folder)} (it has: {', '.join(self.splits)})")
        split = self.splits[name]
        if name not in self._checked:
            split.check()
            self._checked.add(name)
        return split


def _read_index(folder: str, how_to_pack: str, patience: Patience) -> bytes:
    where = location(folder, INDEX_NAME)
    if is_url(folder):
        return fetch_bytes(where, MAX_INDEX_BYTES, patience)
    if not os.path.isdir(folder):
        raise UserError(f"no such shard folder: {folder}. {how_to_pack}")
    if not os.path.isfile(where):
        raise UserError(f"{folder} has no {INDEX_NAME}: no shard folder, or packing was interrupted. {how_to_pack}")
    if os.path.getsize(where) > MAX_INDEX_BYTES:
        raise UserError(f"{where} has more than {MAX_INDEX_BYTES} bytes. {REMEDY}")
    return Path(where).read_bytes()


def _load_split(name: str, folder: str, num_cameras: int, split: dict[str, Any], patience: Patience) -> SplitIndex:
    shards = tuple(ShardInfo(s["name"], s["samples"], s["bytes"], s["sha256"]) for s in split["shards"])
    announced, samples, dtype = split["members"], sum(s.samples for s in shards), member_dtype(num_cameras)
    where = location(folder, announced["name"])
    if not 0 < announced["bytes"] - samples * dtype.itemsize <= NPY_HEADER_BYTES:
        raise damage(
            shown(location(folder, INDEX_NAME)),
            f"splits.{name}.members.bytes",
            f"is {announced['bytes']}, which is not what {samples} samples of {num_cameras} cameras take",
        )
    if not is_url(folder) and not os.path.isfile(where):
        raise UserError(f"{where} is missing. Copy the whole shard folder, or pack the data set again")
    with BytesIO(fetch_bytes(where, announced["bytes"], patience)) if is_url(folder) else open(where, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if (size := file.seek(0, os.SEEK_END), sha256) != (announced["bytes"], announced["sha256"]):
            raise UserError(
                f"{shown(where)} is not the file that was packed: {size} bytes with sha256 {sha256[:12]}..., where "
                f"{INDEX_NAME} says {announced['bytes']} bytes with {announced['sha256'][:12]}.... {REMEDY}"
            )
        file.seek(0)
        try:
            members = np.load(file) if is_url(folder) else np.load(where, mmap_mode="r")
            found = f"{members.shape[0]} rows of {members.dtype}"
        except Exception as error:  # NumPy takes a damaged header for Python, and raises what that does
            raise UserError(f"{shown(where)} is not a readable array ({error}). {REMEDY}") from error
    if (members.shape, members.dtype) != ((samples,), dtype):
        raise UserError(
            f"{shown(where)} does not fit {INDEX_NAME}: {found} where {samples} of {dtype} are announced. {REMEDY}"
        )
    return SplitIndex(name, folder, shards, members, num_cameras, tuple(split["identities"]))
