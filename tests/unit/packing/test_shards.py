"""Packing: what is in the shards, where, and in which order; and what is refused."""

import hashlib
import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ecn_dist import pack as pack_main
from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.errors import UserError
from tests.dataset_folders import (
    MARKET,
    folder_bytes,
    jpeg_bytes,
    member,
    pack_folder,
    picture,
    write_market,
    write_picture,
)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def packed(market: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return pack_folder(market, tmp_path_factory.mktemp("shards"), camera_style="histogram", min_shards=3)


def about(split: SplitIndex, row: np.void) -> dict:
    with open(split.shard_path(int(row["shard"])), "rb") as file:
        file.seek(row["json_offset"])
        return json.loads(file.read(row["json_length"]))


def test_offsets_lead_to_the_files_bytes(market: Path, packed: ShardIndex) -> None:
    for name, split in packed.splits.items():
        for row in split.members:
            described = about(split, row)
            file = market / MARKET[name] / described["file"]
            assert member(split, row, packed.num_cameras) == file.read_bytes()
            assert (described["index"], described["pid"], described["camid"]) == (
                row["index"],
                row["pid"],
                row["camid"],
            )
            assert (row["pid"], row["camid"] + 1) == (int(file.name[:4]), int(file.name[6]))


def test_index_is_the_position_in_the_sorted_file_list(market: Path, packed: ShardIndex) -> None:
    for name, split in packed.splits.items():
        files = sorted(path.name for path in (market / MARKET[name]).glob("[0-9]*.jpg"))
        assert {int(row["index"]): about(split, row)["file"] for row in split.members} == dict(enumerate(files))
        pids = [int(file[:4]) for file in files]
        assert split.identities == tuple(dict.fromkeys(pids))
        assert split.labels.tolist() == [split.identities.index(pid) for pid in split.pids]


def test_plain_webdataset_reads_the_shards(packed: ShardIndex) -> None:
    for name, split in packed.splits.items():
        paths = [split.shard_path(shard) for shard in range(len(split.shards))]
        samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
        assert [sample["json"]["index"] for sample in samples] == split.indices.tolist()
        for sample in samples:
            styles = {f"cam{c:02d}.jpg" for c in range(3) if c != sample["json"]["camid"]} if name == "train" else set()
            assert {key for key in sample if not key.startswith("__")} == {"jpg", "json"} | styles
            assert {sample[key].size for key in styles | {"jpg"}} == {(16, 32)}


def test_histogram_copies_take_on_the_camera(packed: ShardIndex) -> None:
    split = packed.split("train")
    assert split.has_styles
    assert not packed.split("query").has_styles
    pixels = [
        [np.asarray(Image.open(BytesIO(member(split, row, slot))), dtype=float) for row in split.members if rows(row)]
        for slot, rows in (
            (1, lambda row: row["camid"] == 0),
            (3, lambda row: row["camid"] == 1),
            (3, lambda row: row["camid"] == 0),
        )
    ]
    as_camera_1, camera_1, camera_0 = (np.quantile(np.stack(p), [0.1, 0.3, 0.5, 0.7, 0.9]) for p in pixels)
    assert np.abs(as_camera_1 - camera_1).max() < 0.1 * np.abs(camera_0 - camera_1).max()


def test_shards_are_as_the_index_says(packed: ShardIndex) -> None:
    for split in packed.splits.values():
        assert len(split.shards) == 3
        assert max(s.samples for s in split.shards) - min(s.samples for s in split.shards) <= 1
        for position, shard in enumerate(split.shards):
            data = Path(split.shard_path(position)).read_bytes()
            assert (shard.name, shard.bytes) == (f"{split.name}-{position:06d}.tar", len(data))
            assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert {path.name for path in Path(packed.folder).iterdir()} == {
        "index.json",
        *(f"{split}.members.npy" for split in packed.splits),
        *(shard.name for split in packed.splits.values() for shard in split.shards),
    }


def test_order_is_seeded_and_mixed(market: Path, packed: ShardIndex, tmp_path: Path) -> None:
    indices = packed.split("train").indices
    neighbours = np.abs(np.diff(indices))
    assert neighbours.mean() > 0.6 * len(indices) / 3  # a uniform shuffle's is a third
    other = pack_folder(market, tmp_path, seed=1)
    assert other.split("train").indices.tolist() != indices.tolist()


def test_the_order_is_the_same_for_ever(packed: ShardIndex) -> None:
    """Numbers of a generator that is written out, not of NumPy's, whose orders may change with its version."""
    assert packed.split("query").indices.tolist() == [10, 7, 1, 6, 8, 4, 2, 5, 11, 0, 3, 9]


def test_same_bytes_for_any_number_of_workers(market: Path, packed: ShardIndex, tmp_path: Path) -> None:
    pack_folder(market, tmp_path, camera_style="histogram", min_shards=3, workers=2)
    assert folder_bytes(str(tmp_path)) == folder_bytes(packed.folder)


def test_shard_size(tmp_path: Path) -> None:
    write_market(tmp_path / "data", identities=20, splits=["train"])
    index = pack_folder(tmp_path / "data", tmp_path / "shards", shard_mib=1 / 16)
    sizes = [shard.bytes for shard in index.split("train").shards]
    assert len(sizes) >= 3
    assert all(0.7 * 2**16 < size < 1.5 * 2**16 for size in sizes)


def test_members_have_no_owner_and_no_time(packed: ShardIndex) -> None:
    with tarfile.open(packed.split("query").shard_path(0)) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)


def test_an_output_that_cannot_be_written(market: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file is a file; name a folder"):
        pack_folder(market, tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/shards"):
        pack_folder(market, tmp_path / "file" / "shards")


def test_queries_without_any_match_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_picture(root / "query/0001_c1s1_000000_00.jpg", (1,))
    write_picture(root / "bounding_box_test/0001_c1s1_000001_00.jpg", (2,))  # same camera
    write_picture(root / "bounding_box_test/0002_c2s1_000001_00.jpg", (3,))
    with pytest.raises(UserError, match=r"none of the 1 queries .* from another camera"):
        pack_folder(root, tmp_path / "shards")


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_pictures_are_listed(tmp_path: Path, workers: int) -> None:
    root = write_market(tmp_path / "data")
    (root / "query/0101_c1s1_000000_00.jpg").write_bytes(jpeg_bytes(picture((1,)))[:-200])
    (root / "query/0102_c1s1_000000_00.jpg").write_bytes(b"")
    with (root / "query/0103_c1s1_000000_00.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"3 pictures cannot be read: .*0101_c1s1.*0102_c1s1") as failure:
        pack_folder(root, tmp_path / "shards", workers=workers, min_shards=2)
    assert not (tmp_path / "shards" / "index.json").exists()
    assert "0103_c1s1_000000_00.jpg (it has 1,000,000,000,000 bytes" in str(failure.value)
    assert "Replace or remove them" in str(failure.value)


def add_copies(root: Path, template: str, cameras: int = 3) -> Path:
    folder = root / "bounding_box_train_camstyle"
    for path in sorted((root / "bounding_box_train").iterdir()):
        own = int(path.name[6])
        for other in range(1, cameras + 1):
            if other != own:
                name = template.format(stem=path.stem, own=own, other=other)
                write_picture(folder / f"{name}.jpg", (int(path.name[:4]), own, other))
    return folder


@pytest.mark.parametrize("template", ["{stem}_fake_{own}to{other}", "{stem}_fake_{other}"])
def test_shipped_copies_are_used_as_they_are(tmp_path: Path, template: str) -> None:
    root = write_market(tmp_path / "data")
    folder = add_copies(root, template)
    split = pack_folder(root, tmp_path / "shards", camera_style="auto").split("train")
    assert split.has_styles
    for row in split.members:
        stem, own = Path(about(split, row)["file"]).stem, int(row["camid"])
        assert row["length"][own] == 0
        for other in {0, 1, 2} - {own}:
            name = template.format(stem=stem, own=own + 1, other=other + 1)
            assert member(split, row, other) == (folder / f"{name}.jpg").read_bytes()


def test_missing_shipped_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_market(tmp_path / "data")
    folder = add_copies(root, "{stem}_fake_{own}to{other}")
    (folder / "0001_c1s1_000000_00_fake_1to3.jpg").unlink()
    write_picture(folder / "0009_c1s1_000000_00_fake_1to3.jpg", (1,))
    arguments = ["--layout", "market", "--input", str(root), "--output", str(tmp_path / "shards")]
    assert pack_main.main(arguments) == 2
    assert "1 of 48 style copies are missing" in (error := capsys.readouterr().err)
    assert "0001_c1s1_000000_00_fake_1to3" in error
    assert pack_main.main([*arguments, "--allow_missing_styles"]) == 0
    output = capsys.readouterr().out
    assert "train: 1 style copies missing" in output
    assert "1 files of" in output
    split = ShardIndex.load(str(tmp_path / "shards")).split("train")
    assert split.missing_styles == 1
    assert not split.has_styles


def test_styles_that_cannot_be(tmp_path: Path) -> None:
    root = write_market(tmp_path / "data")
    with pytest.raises(UserError, match=r"no folder of style copies.*--camera_style histogram"):
        pack_folder(root, tmp_path / "shards", camera_style="shipped")
    write_picture(root / "query/0101_c7s1_000000_00.jpg", (1,))
    with pytest.raises(UserError, match=r"no training picture of .* comes from camera 7.*--camera_style none"):
        pack_folder(root, tmp_path / "shards", camera_style="histogram")


def test_a_target_of_unknown_people(tmp_path: Path) -> None:
    """Cameras and nothing else: packs as a target, with style copies, and is refused as a source."""
    for camera in ("door", "roof"):
        for number in range(3):
            write_picture(tmp_path / "data" / camera / f"{number}.jpg", (number, len(camera), ord(camera[0])))
    arguments = ["--layout", "folder", "--input", str(tmp_path / "data"), "--output", str(tmp_path / "shards")]
    assert pack_main.main([*arguments, "--pattern", r"^(?P<camid>\w+)/", "--min_shards", "2"]) == 0
    index = ShardIndex.load(str(tmp_path / "shards"))
    assert index.cameras == ("door", "roof")
    split = index.split("train")
    assert split.pids.tolist() == [-1] * 6
    assert split.has_styles
    assert split.num_identities == 0
    with pytest.raises(UserError, match=r"6 of the 6 pictures .* have no identity"):
        _ = split.labels


def test_command(market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layout", "market", "--input", str(market), "--output", str(tmp_path / "shards")]
    assert pack_main.main([*arguments, "--camera_style", "histogram", "--max_size", "64x32"]) == 0
    output = capsys.readouterr().out
    assert "gallery: 2 distractors, 1 junk dropped" in output
    assert "style copies: histogram" in output
    assert "Thumbs.db" in output
    assert pack_main.main(arguments) == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "--overwrite" in error


@pytest.mark.parametrize(
    "wrong", [["--max_size", "64"], ["--shard_mib", "0"], ["--min_shards", "-1"], ["--seed", "-1"], ["--layout", "x"]]
)
def test_wrong_options(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layout", "market", "--input", str(tmp_path), "--output", str(tmp_path / "shards")]
    with pytest.raises(SystemExit) as end:
        pack_main.main([*arguments, *wrong])
    assert end.value.code == 2
    assert wrong[1] in capsys.readouterr().err


def test_the_documents_reader(packed: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that docs/data.md gives to read shards with plain webdataset."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "market").symlink_to(packed.folder)
    monkeypatch.chdir(tmp_path)
    printed: list[tuple] = []
    exec(code, {"print": lambda *values: printed.append(values)})
    split = packed.split("train")
    assert [values[:3] for values in printed] == list(
        zip(split.indices.tolist(), split.pids.tolist(), split.camids.tolist(), strict=True)
    )
    assert {values[4:] for values in printed} == {((16, 32), 2)}
