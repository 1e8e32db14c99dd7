"""The gate that index.json and its sidecars pass before anything of them is used: only what pack writes gets through.

A shard folder may come from anybody. Names go into paths, URLs and commands; numbers become offsets and sizes.
"""

import json
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ecn_dist.errors import UserError

FORMAT_NAME = "ecn_dist shards"
FORMAT_VERSION = 1
SPLIT_NAMES = ("train", "query", "gallery")
UNKNOWN_PID = -1  # a training picture whose identity nobody knows
MAX_INDEX_BYTES = 256 << 20
MAX_CAMERAS = 1000
NPY_HEADER_BYTES = 4096  # at most
REMEDY = "Copy the shard folder again, or pack the data set again"


def parse_index(data: bytes, where: str, how_to_pack: str) -> dict[str, Any]:
    """index.json, checked: types, ranges, names, counts that fit each other, and nothing twice.

    Raises:
        UserError: it is not what pack writes; names `where` and the key.
    """
    try:
        index = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({reprlib.repr(str(error))}). {how_to_pack}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
        raise UserError(f"{where} does not describe a shard folder of ecn_dist. {how_to_pack}")
    if type(index.get("version")) is not int or index["version"] != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {reprlib.repr(index.get('version'))}, and this program reads version "
            f"{FORMAT_VERSION}. Pack the data set again, or use the program that packed it"
        )
    take = _Taker(where)
    take(index, "", "layout", str, lambda text: len(text) < 100)
    num_cameras = take(index, "", "num_cameras", int, lambda count: 1 <= count <= MAX_CAMERAS)
    take(
        index, "", "cameras", list,
        lambda names: len(set(map(str, names))) == num_cameras == len(names) and _all(names, str),
    )  # fmt: skip
    splits = take(index, "", "splits", dict, lambda splits: 0 < len(splits) <= len(SPLIT_NAMES))
    for name in splits:
        if name not in SPLIT_NAMES:
            raise take.damage(f"splits.{reprlib.repr(name)}", "is none of " + ", ".join(SPLIT_NAMES))
        _check_split(take, take(splits, "splits.", name, dict), name)
    return index


def _check_split(take: "_Taker", split: dict[str, Any], name: str) -> None:
    at = f"splits.{name}."
    take(split, at, "identities", list, lambda pids: _all(pids, int) and len(set(pids)) == len(pids))
    if not all(0 <= pid < 2**63 for pid in split["identities"]):
        raise take.damage(f"{at}identities", "holds numbers that no pid can be")
    for position, shard in enumerate(take(split, at, "shards", list, lambda shards: len(shards) > 0)):
        of_shard = f"{at}shards.{position}."
        if not isinstance(shard, dict):
            raise take.damage(of_shard[:-1], f"is {reprlib.repr(shard)}")
        take(shard, of_shard, "name", str, lambda text: re.fullmatch(rf"{name}-[0-9]{{6,12}}\.tar", text) is not None)
        take(shard, of_shard, "samples", int, lambda count: 0 < count < 2**40)
        take(shard, of_shard, "bytes", int, lambda count: 0 < count < 2**50)
        take(shard, of_shard, "sha256", str, _is_sha256)
    if len({shard["name"] for shard in split["shards"]}) != len(split["shards"]):
        raise take.damage(f"{at}shards", "names a shard twice")
    members = take(split, at, "members", dict)
    take(members, f"{at}members.", "name", str, lambda text: text == f"{name}.members.npy")
    take(members, f"{at}members.", "bytes", int, lambda count: 0 < count < 2**50)
    take(members, f"{at}members.", "sha256", str, _is_sha256)


class _Taker:
    """Takes values from objects of index.json, of the type and in the range that they must have."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(
        self, about: dict[str, Any], at: str, key: str, kind: type, fits: Callable[[Any], bool] = lambda _: True
    ) -> Any:
        if key not in about:
            raise self.damage(at + key, "is missing")
        value = about[key]
        if type(value) is not kind or not fits(value):  # a bool is no int here
            raise self.damage(at + key, f"is {reprlib.repr(value)}")
        return value

    def damage(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.where} is damaged: {key} {problem}. {REMEDY}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _all(values: Sequence[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def check_rows(
    where: str,
    members: np.ndarray,
    shards: Sequence[tuple[int, int]],
    num_cameras: int,
    identities: Sequence[int],
    unknown_pids: bool,
) -> None:
    """Whether a sidecar's rows can be what pack wrote: every number where it may be.

    Args:
        where: names the sidecar.
        members: its rows.
        shards: (samples, bytes) of each shard.
        num_cameras, identities: as index.json announces.
        unknown_pids: whether -1 may stand for a pid.

    Raises:
        UserError: a row that cannot be; names `where` and the column.
    """
    known = np.sort(np.array([*identities, UNKNOWN_PID] if unknown_pids else identities, dtype=np.int64))
    seen = np.zeros(len(members), dtype=bool)
    start = 0
    for shard, (samples, num_bytes) in enumerate(shards):  # so that ten million rows need little memory
        rows = members[start : start + samples]
        start += samples
        indices, pids, lengths, offsets = (np.asarray(rows[name]) for name in ("index", "pid", "length", "offset"))
        inside = (indices >= 0) & (indices < len(members))
        seen[indices[inside]] = True
        places = np.minimum(np.searchsorted(known, pids), max(len(known) - 1, 0))
        wrong = {
            "shard": rows["shard"] != shard,
            "index": ~inside,
            "camid": (rows["camid"] < 0) | (rows["camid"] >= num_cameras),
            "pid": known[places] != pids if len(known) else np.ones(samples, dtype=bool),
            "length": ((lengths < 0) | (lengths > num_bytes)).any(axis=1) | (lengths[:, -1] == 0),
            "offset": ((offsets < 0) | (offsets > num_bytes - lengths)).any(axis=1),
        }
        for column, rows_wrong in wrong.items():
            if rows_wrong.any():
                row = int(rows_wrong.argmax())
                raise UserError(
                    f"{where} is damaged: {column} of sample {start - samples + row} is "
                    f"{reprlib.repr(rows[column][row].tolist())}. {REMEDY}"
                )
    if not seen.all():
        raise UserError(f"{where} is damaged: index is not 0 .. {len(members) - 1}, each once. {REMEDY}")
