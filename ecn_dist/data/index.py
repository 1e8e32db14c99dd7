"""The index of a shard folder: what is in it, and at which byte of which shard.

`index.json` describes the folder; beside it each split has a sidecar `{split}.members.npy` with one row per sample, in
shard order and in tar order inside a shard (`member_dtype`). The rows are memory-mapped, so that ten million samples
cost a process no memory of its own.

C cameras of the folder.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ecn_dist.data.fetch import Patience, fetch_bytes
from ecn_dist.errors import UserError

INDEX_NAME = "index.json"
FORMAT_NAME = "ecn_dist shards"
FORMAT_VERSION = 1
UNKNOWN_PID = -1  # a training picture whose identity nobody knows


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
    """Whether `folder` is opened through webdataset (`https://...`, `pipe:...`) rather than as a local folder."""
    return "://" in folder or folder.startswith("pipe:")


def location(folder: str, name: str) -> str:
    """Path or URL of the file `name`. A URL may say where the name goes: `pipe:aws s3 cp s3://bucket/market/{} -`."""
    if is_url(folder) and "{}" in folder:
        return folder.replace("{}", name)
    return f"{folder.rstrip('/')}/{name}"


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

    @cached_property
    def pids(self) -> np.ndarray:
        """(n,) int64, as in the data set; -1 where unknown (in the training split only)."""
        return self.members["pid"].astype(np.int64)

    @cached_property
    def camids(self) -> np.ndarray:
        """(n,) int64, from 0."""
        return self.members["camid"].astype(np.int64)

    @cached_property
    def indices(self) -> np.ndarray:
        """(n,) int64, each of 0..n-1 once: the exemplar index."""
        return self.members["index"].astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """(n,) int64, position of the pid in `identities`. `UserError` where a picture has no known identity."""
        unknown = int((self.pids == UNKNOWN_PID).sum())
        if unknown:
            raise UserError(
                f"{unknown} of the {len(self)} pictures of split {self.name!r} in {self.folder} have no identity: "
                "it can be a target, but not a source. Name a labelled shard folder instead"
            )
        identities = np.asarray(self.identities, dtype=np.int64)
        order = np.argsort(identities, kind="stable")
        return order[np.searchsorted(identities, self.pids, sorter=order)].astype(np.int64)

    @property
    def shard_samples(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.shards]

    @property
    def num_identities(self) -> int:
        return len(self.identities)

    @cached_property
    def missing_styles(self) -> int:
        """How many style copies the split lacks; 0 when every sample has one for each of the C - 1 other cameras."""
        present = np.count_nonzero(self.members["length"][:, : self.num_cameras])
        return len(self) * (self.num_cameras - 1) - int(present)

    @property
    def has_styles(self) -> bool:
        """Whether every sample has all its style copies."""
        return self.missing_styles == 0

    def shard_path(self, shard: int) -> str:
        """Path or URL of a shard, by its position in `shards`."""
        return location(self.folder, self.shards[shard].name)

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

    @classmethod
    def load(cls, folder: str, patience: Patience | None = None) -> "ShardIndex":
        """Read `index.json` and map the sidecars, whose size and checksum are verified. Shards are not touched.

        Args:
            folder: a path, or the prefix of URLs that webdataset opens (`location` says how names are joined to it).
            patience: with a URL.

        Raises:
            UserError: there is no such folder or index, its format version is not this program's, or a sidecar is
                missing or is not the one that was packed; a URL cannot be fetched.
        """
        folder = str(folder)
        index = _parse(_read_index(folder, patience), folder)
        try:
            num_cameras = int(index["num_cameras"])
            splits = {
                name: _load_split(name, folder, num_cameras, split, patience) for name, split in index["splits"].items()
            }
            return cls(folder, str(index["layout"]), num_cameras, tuple(map(str, index["cameras"])), splits, index)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            where = location(folder, INDEX_NAME)
            raise UserError(f"{where} is damaged ({error!r}). Pack the data set again") from error

    def split(self, name: str) -> SplitIndex:
        """The split's index. `UserError` naming the splits that exist where it does not."""
        if name not in self.splits:
            there = ", ".join(self.splits) or "none"
            raise UserError(f"no split {name!r} in {self.folder} (it has: {there})")
        return self.splits[name]


def _how_to_pack(folder: str) -> str:
    output = "shards/NAME" if is_url(folder) else folder
    return f"Pack a data set first: python -m ecn_dist.pack --layout market --input FOLDER --output {output}"


def _read_index(folder: str, patience: Patience | None) -> bytes:
    if not is_url(folder):
        if not Path(folder).is_dir():
            raise UserError(f"no such shard folder: {folder}. {_how_to_pack(folder)}")
        if not (Path(folder) / INDEX_NAME).is_file():
            raise UserError(
                f"{folder} has no {INDEX_NAME}: it is not a shard folder, or packing was interrupted. "
                f"{_how_to_pack(folder)}"
            )
    return _read(location(folder, INDEX_NAME), patience)


def _read(where: str, patience: Patience | None) -> bytes:
    return fetch_bytes(where, patience) if is_url(where) else Path(where).read_bytes()


def _parse(text: bytes, folder: str) -> dict[str, Any]:
    where = location(folder, INDEX_NAME)
    try:
        index = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}). {_how_to_pack(folder)}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
        raise UserError(f"{where} does not describe a shard folder of ecn_dist. {_how_to_pack(folder)}")
    if index.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {index.get('version')}, and this program reads version {FORMAT_VERSION}. "
            "Pack the data set again, or use the program that packed it"
        )
    return index


def _load_split(
    name: str, folder: str, num_cameras: int, split: dict[str, Any], patience: Patience | None
) -> SplitIndex:
    shards = tuple(ShardInfo(s["name"], s["samples"], s["bytes"], s["sha256"]) for s in split["shards"])
    members = _load_members(location(folder, split["members"]["name"]), split["members"], patience)
    expected = sum(shard.samples for shard in shards)
    if members.dtype != member_dtype(num_cameras) or members.shape != (expected,):
        raise UserError(
            f"{split['members']['name']} in {folder} does not fit {INDEX_NAME}: {members.shape} rows of "
            f"{members.dtype} where {expected} of {num_cameras} cameras are announced. Pack the data set again"
        )
    return SplitIndex(name, folder, shards, members, num_cameras, tuple(map(int, split["identities"])))


def _load_members(where: str, announced: dict[str, Any], patience: Patience | None) -> np.ndarray:
    """The sidecar's rows: memory-mapped if local, read whole from a URL."""
    if is_url(where):
        data = fetch_bytes(where, patience)
        size, sha256 = len(data), hashlib.sha256(data).hexdigest()
    elif not Path(where).is_file():
        raise UserError(f"{where} is missing. Copy the whole shard folder, or pack the data set again")
    else:
        size = Path(where).stat().st_size
        with open(where, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if size != announced["bytes"] or sha256 != announced["sha256"]:
        raise UserError(
            f"{where} is not the file that was packed: {size} bytes with sha256 {sha256[:12]}..., where {INDEX_NAME} "
            f"says {announced['bytes']} bytes with {str(announced['sha256'])[:12]}.... Copy the shard folder again, or "
            "pack the data set again"
        )
    try:
        if is_url(where):
            return np.load(BytesIO(data), allow_pickle=False)
        return np.load(where, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{where} is not a readable array ({error}). Pack the data set again") from error
