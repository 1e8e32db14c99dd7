"""validate finds nothing in sound shards, and each kind of damage in damaged ones."""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ecn_dist import validate as validate_main
from ecn_dist.data.index import ShardIndex
from ecn_dist.packing.validation import validate
from tests.dataset_folders import pack_folder, write_market, write_picture

SHARD = "train-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    pack_folder(write_market(root / "data"), root / "shards", camera_style="histogram", min_shards=2)
    return root / "shards"


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def problems_of(folder: Path | str) -> list[str]:
    return validate(ShardIndex.load(str(folder)), workers=1)


def rewrite_members(folder: Path, change: Callable[[np.ndarray], None], split: str = "train") -> None:
    """Change a sidecar and make index.json fit it, so that only what the rows say is wrong."""
    path = folder / f"{split}.members.npy"
    members = np.load(path)
    change(members)
    np.save(path, members)
    index = json.loads((folder / "index.json").read_text())
    index["splits"][split]["members"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def first_row(folder: Path) -> np.void:
    """The first sample of SHARD."""
    members = ShardIndex.load(str(folder)).split("train").members
    return members[members["shard"] == 1][0]


def test_sound_shards(sound: Path) -> None:
    assert problems_of(sound) == []
    assert validate(ShardIndex.load(str(sound)), workers=2) == []


def test_sound_shards_by_url(sound: Path) -> None:
    assert problems_of(f"pipe:cat {sound}/{{}}") == []


@pytest.mark.timeout(60)
def test_a_source_that_never_ends_is_given_up_at_the_announced_size(sound: Path) -> None:
    problems = problems_of(f"pipe:case {{}} in *.tar) cat /dev/zero;; *) cat {sound}/{{}};; esac")
    assert len(problems) == 6
    assert all("has more than the" in problem for problem in problems)


def test_a_shard_that_is_no_file(shards: Path) -> None:
    (shards / SHARD).unlink()
    os.mkfifo(shards / SHARD)
    assert problems_of(shards) == [f"{shards}/{SHARD} is no file"]


@pytest.mark.parametrize(("name", "value"), [("samples", 10**9), ("num_identities", 3), ("camids", [0, 1])])
def test_what_the_index_announces(shards: Path, name: str, value: object) -> None:
    index = json.loads((shards / "index.json").read_text())
    right, index["splits"]["train"][name] = index["splits"]["train"][name], value
    (shards / "index.json").write_text(json.dumps(index))
    assert problems_of(shards) == [f"train: index.json says {name} {value!r}, and the pictures' are {right!r}"]


def test_corrupt_picture(shards: Path) -> None:
    row = first_row(shards)
    patch(shards / SHARD, int(row["offset"][3]), b"\0" * 40)
    changed, unreadable = problems_of(shards)
    assert f"{SHARD} has changed since it was packed" in changed
    assert f"{SHARD}: {row['index']:08d}.jpg cannot be read" in unreadable


def test_changed_bytes_that_still_decode(shards: Path) -> None:
    size = (shards / SHARD).stat().st_size
    patch(shards / SHARD, size - 1, b"x")  # padding after the archive
    (changed,) = problems_of(shards)
    assert f"{SHARD} has changed since it was packed" in changed


def test_truncated_shard(shards: Path) -> None:
    path = shards / SHARD
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert problems_of(shards) == [f"{path} has {size // 2} bytes, and was packed with {size}"]


def test_a_shard_that_is_no_archive(shards: Path) -> None:
    path = shards / SHARD
    path.write_bytes(b"x" * path.stat().st_size)
    changed, unreadable = problems_of(shards)
    assert "has changed" in changed
    assert f"{SHARD} cannot be read: ReadError" in unreadable


@pytest.mark.timeout(60)
def test_a_member_of_negative_size(shards: Path) -> None:
    """Python up to 3.11.13 reads its header again and again."""
    header = tarfile.TarInfo("00000000.jpg")
    header.size = -512
    path = shards / SHARD
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + path.read_bytes()[512:])
    assert any("has a size of -512" in problem for problem in problems_of(shards))


def test_missing_shard(shards: Path) -> None:
    (shards / SHARD).unlink()
    assert problems_of(shards) == [f"{shards}/{SHARD} is missing"]


def test_json_that_differs_from_the_sidecar(shards: Path) -> None:
    row = first_row(shards)
    with open(shards / SHARD, "rb") as file:
        file.seek(row["json_offset"])
        text = file.read(row["json_length"])
    patch(shards / SHARD, int(row["json_offset"]), text.replace(b'"pid": ', b'"pid":9'))
    _, different = problems_of(shards)
    assert f"{row['index']:08d}.json differs from the sidecar in pid" in different


def test_wrong_offset(shards: Path) -> None:
    def change(members: np.ndarray) -> None:
        members["offset"][0, -1] += 1

    rewrite_members(shards, change)
    (problem,) = problems_of(shards)
    assert "train-000000.tar" in problem
    assert ".jpg is not at byte" in problem


def test_members_without_a_row(shards: Path) -> None:
    def change(members: np.ndarray) -> None:
        slot = int(members["length"][0].nonzero()[0][0])
        members["length"][0, slot] = 0

    rewrite_members(shards, change)
    missing, unknown = problems_of(shards)
    assert missing == "train: 1 of 48 style copies are missing"
    assert "train-000000.tar holds members that the sidecar does not know: 000000" in unknown


def test_indices_that_are_not_each_once(shards: Path) -> None:
    def change(members: np.ndarray) -> None:
        members["index"][0] = members["index"][1]

    rewrite_members(shards, change)
    assert "train: the indices are not 0..23, each once" in problems_of(shards)


def test_identities_and_cameras(shards: Path) -> None:
    def change(members: np.ndarray) -> None:
        members["camid"][0] = 3
        members["pid"][1] = 77

    rewrite_members(shards, change, "query")
    problems = problems_of(shards)
    assert "query: cameras outside 0..2: 3" in problems
    assert "query: the identities in index.json are not those of the pictures" in problems
    assert any("query: 1 of 12 have no true match from another camera in the gallery: pid 77" in p for p in problems)


def test_order_of_identities(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["splits"]["train"]["identities"].reverse()
    (shards / "index.json").write_text(json.dumps(index))
    assert problems_of(shards) == ["train: the identities in index.json are not in the order of their first appearance"]


def test_a_stray_archive(shards: Path) -> None:
    shutil.copy(shards / SHARD, shards / "train-000002.tar")
    assert problems_of(shards) == ["1 tar files are not in index.json: train-000002.tar"]


def test_queries_without_match(tmp_path: Path) -> None:
    root = write_market(tmp_path / "data")
    write_picture(root / "query/0999_c1s1_000000_00.jpg", (1,))
    pack_folder(root, tmp_path / "shards")
    (problem,) = problems_of(tmp_path / "shards")
    assert problem.startswith("query: 1 of 13 have no true match from another camera in the gallery: pid 999 camid 0")


def test_many_problems_of_a_shard_are_cut_short(shards: Path) -> None:
    def change(members: np.ndarray) -> None:
        members["offset"] += 1

    rewrite_members(shards, change)
    problems = problems_of(shards)
    assert len(problems) == 2 * 4  # of two shards, three each and how many more
    assert problems[3].startswith(f"{shards}/train-000000.tar: ")
    assert problems[3].endswith(" more problems")


def test_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_main.main([str(shards), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "is sound" in output
    for split, ids, images in (("train", 4, 24), ("query", 4, 12), ("gallery", 4, 14)):
        (line,) = [line for line in output.splitlines() if line.startswith(f"│ {split}")]
        assert [cell.strip() for cell in line.strip("│").split("│")][:4] == [split, str(ids), str(images), "3"]
    (shards / SHARD).unlink()
    assert validate_main.main([str(shards), "--workers", "1"]) == 1
    assert f"wrong: {shards}/{SHARD} is missing" in capsys.readouterr().err
    assert validate_main.main([str(shards / "nowhere")]) == 2


def test_workers_below_one(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        validate_main.main([str(shards), "--workers", "-3"])
    assert "'-3' must be a whole number, at least 1" in capsys.readouterr().err
