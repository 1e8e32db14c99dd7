"""The gate that index.json and its sidecars pass before anything of them is used: only what pack writes gets through.

A shard folder may come from anybody. Names go into paths, URLs and commands; numbers become offsets and sizes.
"""

import json
import re
import reprlib
from collections.abc import Callable
from typing import Any

from ecn_dist.errors import UserError

FORMAT_NAME = "ecn_dist shards"
FORMAT_VERSION = 1
SPLIT_NAMES = ("train", "query", "gallery")
UNKNOWN_PID = -1  # a training picture whose identity nobody knows
MAX_INDEX_BYTES = 256 << 20
MAX_CAMERAS = 1000
REMEDY = "Copy the shard folder again, or pack the data set again"

Fits = Callable[[Any], bool]


def _text(pattern: str) -> Fits:
    return lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


def _number(least: int, below: int) -> Fits:
    return lambda value: type(value) is int and least <= value < below  # a bool is no int here


def _each_once(item: Fits) -> Fits:
    return lambda values: type(values) is list and all(map(item, values)) and len(set(values)) == len(values)


# What an object must have: a dict for an object, a list of one for objects in a list that is not empty, or what fits.
# What stands under a name that ends in ? may be missing.
FILE = {"bytes": _number(1, 2**50), "sha256": _text("[0-9a-f]{64}")}
FOLDER = {
    "layout": _text(r"[ -~]{0,99}"),
    "num_cameras": _number(1, MAX_CAMERAS + 1),
    "cameras": _each_once(_text(r"(?s).*")),
    "splits": lambda splits: type(splits) is dict and set() < set(splits) <= set(SPLIT_NAMES),
    "camera_style?": _text("[a-z]{1,20}"),
}
SPLITS = {
    name: {
        "identities": _each_once(_number(0, 2**63)),
        "shards": [{"name": _text(rf"{name}-[0-9]{{6,12}}\.tar"), "samples": _number(1, 2**40), **FILE}],
        "members": {"name": _text(rf"{name}\.members\.npy"), **FILE},
        **dict.fromkeys(("samples?", "num_identities?", "distractors?", "junk_dropped?"), _number(0, 2**53)),
        "camids?": _each_once(_number(0, MAX_CAMERAS)),
        "missing_styles?": lambda value: value is None or _number(0, 2**53)(value),
    }
    for name in SPLIT_NAMES
}


def parse_index(data: bytes, where: str, how_to_pack: str) -> dict[str, Any]:
    """index.json, checked: types, ranges, names, counts that fit each other, and nothing twice.

    Raises `UserError`, naming `where` and the key, where it is not what pack writes.
    """
    try:
        index = json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({reprlib.repr(str(error))}). {how_to_pack}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
        raise UserError(f"{where} does not describe a shard folder of ecn_dist. {how_to_pack}")
    if not _number(FORMAT_VERSION, FORMAT_VERSION + 1)(version := index.get("version")):
        found = f"has format version {reprlib.repr(version)}, and this program reads version {FORMAT_VERSION}"
        raise UserError(f"{where} {found}. Pack the data set again, or use the program that packed it")
    _check(index, FOLDER, where)
    if len(index["cameras"]) != index["num_cameras"]:
        raise damage(where, "cameras", f"is {reprlib.repr(index['cameras'])}")
    for name, split in index["splits"].items():
        _check(split, SPLITS[name], where, f"splits.{name}")
        if len({shard["name"] for shard in split["shards"]}) < len(split["shards"]):
            raise damage(where, f"splits.{name}.shards", "names a shard twice")
    return index


def _check(value: Any, rules: Any, where: str, key: str = "") -> None:
    """`UserError` where a value, or one within it, is not as the rules say."""
    kind = type(rules)
    if not rules(value) if callable(rules) else type(value) is not kind or (kind is list and not value):
        raise damage(where, key, f"is {reprlib.repr(value)}")
    if isinstance(rules, dict):
        for name in value.keys() - {name.removesuffix("?") for name in rules}:  # a later program's, or somebody else's
            if _depth(value[name], most=4) > 4:
                raise damage(where, f"{key}.{name}".lstrip("."), "is nested too deep")
        for name, inner in rules.items():
            name, optional = name.removesuffix("?"), name.endswith("?")
            within = f"{key}.{name}".lstrip(".")
            if name in value:
                _check(value[name], inner, where, within)
            elif not optional:
                raise damage(where, within, "is missing")
    elif isinstance(rules, list):
        for position, item in enumerate(value):
            _check(item, rules[0], where, f"{key}.{position}")


def _depth(value: Any, most: int) -> int:
    """How deep lists and objects are nested in `value`; at most `most` + 1."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or most < 0:
        return 0
    return 1 + max((_depth(item, most - 1) for item in inner), default=0)


def damage(where: str, key: str, problem: str) -> UserError:
    """The error about a key of index.json, or a column of a sidecar."""
    return UserError(f"{where} is damaged: {key} {problem}. {REMEDY}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
