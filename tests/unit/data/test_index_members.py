"""The sidecar of an index: rows that cannot be, files that are none."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ecn_dist.data.index import ShardIndex
from ecn_dist.errors import UserError
from tests.unit.data.index_folder import read_json, write_index


def rewrite_sidecar(folder: Path, members: np.ndarray | bytes) -> None:
    """Another sidecar, to which index.json is made to fit."""
    path = folder / "train.members.npy"
    path.write_bytes(members) if isinstance(members, bytes) else np.save(path, members)
    index = read_json(folder)
    data = path.read_bytes()
    index["splits"]["train"]["members"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_index(folder, index)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", 1), ("shard", -1), ("shard", 2**31 - 1), ("index", 4), ("index", -1), ("index", 0), ("pid", 4),
        ("pid", -2),
        ("camid", 3), ("camid", -1), ("length", -1), ("length", 0), ("length", 101), ("offset", -1), ("offset", 94),
        ("offset", 2**63 - 1), ("json_length", -1), ("json_length", 101), ("json_offset", -1), ("json_offset", 101),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused_before_they_are_used(folder: Path, column: str, value: int) -> None:
    members = np.load(folder / "train.members.npy")
    members[column][0] = value
    rewrite_sidecar(folder, members)
    index = ShardIndex.load(str(folder))
    assert len(index.splits["train"]) == 4  # for who wants to tell all that is wrong
    with pytest.raises(UserError, match=rf"train\.members\.npy is damaged: {column} .*Copy the shard folder again"):
        index.split("train")


def test_the_place_of_a_copy_that_is_not_there_is_not_looked_at(folder: Path) -> None:
    members = np.load(folder / "train.members.npy")
    assert members["length"][0, 0] == 0  # its own camera's
    members["offset"][0, 0] = 2**63 - 1
    rewrite_sidecar(folder, members)
    assert len(ShardIndex.load(str(folder)).split("train")) == 4


def test_a_copy_of_a_pictures_own_camera_is_refused(folder: Path) -> None:
    members = np.load(folder / "train.members.npy")
    members["length"][0, 0] = members["length"][0, -1]
    rewrite_sidecar(folder, members)
    with pytest.raises(UserError, match=r"train\.members\.npy is damaged: length of sample 0 is"):
        ShardIndex.load(str(folder)).split("train")


def test_shards_may_be_larger_than_32_bits_count(folder: Path) -> None:
    members, index = np.load(folder / "train.members.npy"), read_json(folder)
    index["splits"]["train"]["shards"][0]["bytes"] = 2**33
    write_index(folder, index)
    members["offset"][0] = 2**33 - 7
    rewrite_sidecar(folder, members)
    assert ShardIndex.load(str(folder)).split("train").members["offset"][0, 0] == 2**33 - 7


def test_unknown_identities_are_for_training_alone(folder: Path) -> None:
    members = np.load(folder / "train.members.npy")
    members["pid"][1] = -1
    rewrite_sidecar(folder, members)
    assert ShardIndex.load(str(folder)).split("train").pids.tolist() == [5, -1, 5, 9]
    (folder / "train.members.npy").rename(folder / "query.members.npy")
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace("train", "query"))
    with pytest.raises(UserError, match=r"query\.members\.npy is damaged: pid of sample 1 is -1"):
        ShardIndex.load(str(folder)).split("query")


@pytest.mark.parametrize("address", ["{folder}", "pipe:cat {folder}/{{}}"])
@pytest.mark.parametrize("kind", ["zip", "rubbish", "huge", "longer", "pickle"])
def test_a_sidecar_that_is_no_array_is_refused(folder: Path, kind: str, address: str) -> None:
    whole = (folder / "train.members.npy").read_bytes()
    data = {
        "zip": b"PK\3\4" + whole[4:],
        "rubbish": b"?" * len(whole),
        "huge": whole.replace(b"'shape': (4,)", b"'shape': (9**"),
        "longer": whole.replace(b"(4,)", b"(9,)"),
        "pickle": whole.replace(b"<i8", b"|O8", 1),
    }[kind]
    rewrite_sidecar(folder, data)
    with pytest.raises(UserError, match=r"train\.members\.npy (is not a readable array|does not fit index\.json)"):
        ShardIndex.load(address.format(folder=folder))


def test_a_sidecar_of_another_size_or_checksum_or_none(folder: Path) -> None:
    sidecar = folder / "train.members.npy"
    data = sidecar.read_bytes()
    for wrong in (data[:-1], data[:-1] + b"?"):
        sidecar.write_bytes(wrong)
        with pytest.raises(UserError, match="is not the file that was packed"):
            ShardIndex.load(str(folder))
    sidecar.unlink()
    with pytest.raises(UserError, match=r"train\.members\.npy is missing"):
        ShardIndex.load(str(folder))


def test_sidecar_that_does_not_fit_the_index(folder: Path) -> None:
    index = read_json(folder)
    index["splits"]["train"]["shards"].pop()
    write_index(folder, index)
    with pytest.raises(UserError, match=r"train\.members\.npy does not fit index\.json: 4 rows"):
        ShardIndex.load(str(folder))
