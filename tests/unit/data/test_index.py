"""ShardIndex: what it reads, and what it refuses."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecn_dist.data.fetch import Patience
from ecn_dist.data.index import ShardIndex, ShardInfo, SplitIndex, location
from ecn_dist.errors import UserError
from tests.unit.data.index_folder import NUM_CAMERAS, make_members, read_json, write_index


def make_split(pids: list[int], identities: tuple[int, ...]) -> SplitIndex:
    members = make_members(pids)
    return SplitIndex("train", "shards", (ShardInfo("a.tar", len(pids), 1, "0"),), members, NUM_CAMERAS, identities)


def check_contents(index: ShardIndex) -> None:
    assert (index.layout, index.num_cameras, index.cameras) == ("market", 3, ("1", "2", "4"))
    split = index.split("train")
    assert len(split) == 4
    assert split.pids.tolist() == [5, 3, 5, 9]
    assert split.pids.dtype == split.camids.dtype == split.indices.dtype == split.labels.dtype == np.int64
    assert split.camids.tolist() == [0, 1, 2, 0]
    assert split.indices.tolist() == [3, 2, 1, 0]
    assert split.labels.tolist() == [1, 2, 1, 0]
    assert split.identities == (9, 5, 3)
    assert split.num_identities == 3
    assert split.shards[1] == ShardInfo("train-000001.tar", 1, 50, "0b" * 32)


def test_reads_a_folder(folder: Path) -> None:
    index = ShardIndex.load(str(folder))
    check_contents(index)
    assert index.split("train").shard_path(1) == f"{folder}/train-000001.tar"
    assert isinstance(index.split("train").members, np.memmap)


def test_reads_a_url(folder: Path) -> None:
    url = f"pipe:cat {folder}/{{}}"
    index = ShardIndex.load(url)
    check_contents(index)
    assert index.split("train").shard_path(0) == f"pipe:cat {folder}/train-000000.tar"


def test_unreadable_url(folder: Path) -> None:
    with pytest.raises(UserError, match=r"pipe:cat .*nowhere/index\.json cannot be fetched, after 1 attempts"):
        ShardIndex.load(f"pipe:cat {folder}/nowhere/{{}}", Patience(attempts=1))


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/data/shards", "/data/shards/x.tar"),
        ("/data/{}/", "/data/{}/x.tar"),
        ("https://host/shards/", "https://host/shards/x.tar"),
        ("https://host/{}?key=1", "https://host/x.tar?key=1"),
        ("pipe:aws s3 cp s3://bucket/{} -", "pipe:aws s3 cp s3://bucket/x.tar -"),
    ],
)
def test_locations(prefix: str, expected: str) -> None:
    assert location(prefix, "x.tar") == expected


def test_a_pickled_split_maps_its_sidecar_again(folder: Path) -> None:
    split = ShardIndex.load(str(folder)).split("train")
    assert split.pids.size == 4  # cached, and not pickled
    data = pickle.dumps(split)
    assert split.members.tobytes() not in data
    again = pickle.loads(data)
    assert isinstance(again.members, np.memmap)
    assert np.array_equal(again.members, split.members)
    assert again.labels.tolist() == split.labels.tolist()


def test_labels_are_positions_in_identities() -> None:
    assert make_split([30, 10, 20, 10], (20, 30, 10)).labels.tolist() == [1, 2, 0, 2]


def test_unknown_identities_have_no_labels() -> None:
    with pytest.raises(UserError, match="2 of the 3 pictures of split 'train' in shards have no identity"):
        _ = make_split([-1, 4, -1], (4,)).labels


def test_missing_styles_are_counted() -> None:
    assert make_split([1, 2, 3], (1, 2, 3)).has_styles
    split = make_split([1, 2, 3], (1, 2, 3))
    split.members["length"][0, 1] = 0
    assert (split.missing_styles, split.has_styles) == (1, False)


def test_unknown_split_names_those_that_exist(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'query' in .* \(it has: train\)"):
        ShardIndex.load(str(folder)).split("query")


@pytest.mark.parametrize(
    ("name", "text"), [("nowhere", r"no such shard folder: .*nowhere"), ("", r"has no index.json")]
)
def test_what_is_no_shard_folder_says_how_to_pack(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"{text}.*ecn_dist\.pack .* --output .*{name}"):
        ShardIndex.load(str(tmp_path / name))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "something else"}'])
def test_other_files_are_refused(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json (is not JSON|does not describe)"):
        ShardIndex.load(str(folder))


def change(index: dict[str, Any], key: str, value: object) -> None:
    """Set `key` (a path), or remove it where the value is `REMOVED`."""
    *path, last = key.split(".")
    at: Any = index
    for name in path:
        at = at[int(name) if isinstance(at, list) else name]
    if value is REMOVED:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value


REMOVED = object()
SHARD = "splits.train.shards.1."
MEMBERS = "splits.train.members."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, REMOVED) for key in ("num_cameras", "layout", "cameras", "splits", "splits.train.members")),
        *((f"{SHARD}{name}", REMOVED) for name in ("name", "samples", "bytes", "sha256")),
        *(("num_cameras", value) for value in ("many", -3, 0, None, 10**30, 3.0, True)),
        *(("cameras", value) for value in ("abc", ["1", "1", "2"], ["1", 2, "3"], [[], [], []])),
        ("layout", 7),
        ("layout", "x" * 5000),
        ("layout", "\x1b[2Jmarket"),
        *(("camera_style", value) for value in (7, "", "\x1b[2J", [])),
        *((f"splits.train.{key}", value) for key in ("samples", "distractors") for value in ("1\n", -1, None)),
        *(("splits.train.camids", value) for value in ("abc", [0, 0], [2000], None)),
        ("splits.train.missing_styles", "many"),
        ("later", json.loads("[" * 900 + "]" * 900)),
        ("splits.train.later", json.loads('{"a":' * 5 + "1" + "}" * 5)),
        ("splits", []),
        ("splits", {}),
        ("splits.train", "x"),
        ("splits", {"../../etc": {}}),
        *(("splits.train.identities", value) for value in ([9, 5, 5], [9, "5"], [9, -1], [2**63], {}, None)),
        ("splits.train.shards", []),
        ("splits.train.shards.0", 5),
        *(
            (f"{SHARD}name", value)
            for value in (
                "../train-000001.tar", "train-000001.tar; touch PWNED #", "train-000001.tar\n", "train-00001.tar",
                "query-000001.tar", "train-[1-9].tar", "train-\0.tar", "train-" + "1" * 5000 + ".tar", 5, None,
                "train-000000.tar",
            )
        ),
        *((f"{SHARD}samples", value) for value in (0, -1, 1.0, "1", 10**20)),
        *((f"{SHARD}bytes", value) for value in (0, -1, None, 10**30)),
        *((f"{SHARD}sha256", value) for value in ("0b", "Z" * 64, 7)),
        *((f"{MEMBERS}name", value) for value in ("train.members.npy; touch PWNED #", "../train.members.npy", "/etc")),
        *((f"{MEMBERS}bytes", value) for value in (0, 10**30, 10, 5000)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("address", ["{folder}", "pipe:cat {folder}/{{}}"])
def test_what_pack_does_not_write_is_refused_by_file_and_key(
    folder: Path, key: str, value: object, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = read_json(folder)
    change(index, key, value)
    write_index(folder, index)
    monkeypatch.chdir(folder)
    # The object itself is named where it holds something twice.
    named = "splits.train.shards" if value == "train-000000.tar" else key
    with pytest.raises(UserError) as caught:
        ShardIndex.load(address.format(folder=folder))
    assert f"{location(address.format(folder=folder), 'index.json')} is damaged: {named} " in str(caught.value)
    assert "Copy the shard folder again, or pack the data set again" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert not (folder / "PWNED").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"format": "ecn_dist shards", "format": "x"}', "\xff", "1" * 5000]
)
def test_text_that_no_parser_should_choke_on_is_refused(folder: Path, text: str) -> None:
    (folder / "index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"index\.json (is not JSON|does not describe)"):
        ShardIndex.load(str(folder))


def test_what_a_later_program_adds_is_left_alone(folder: Path) -> None:
    index = read_json(folder)
    change(index, "splits.train.later", {"a": [{"b": [1]}]})
    write_index(folder, index)
    assert len(ShardIndex.load(str(folder)).split("train")) == 4


@pytest.mark.parametrize("version", ["1", 1.0, True, None, 2])
def test_a_version_is_a_number_and_this_one(folder: Path, version: object) -> None:
    write_index(folder, read_json(folder) | {"version": version})
    with pytest.raises(UserError, match=f"has format version {version!r}, and this program reads version 1"):
        ShardIndex.load(str(folder))
