"""Folders of every layout -> records, and what does not fit."""

import os
from itertools import compress
from pathlib import Path

import numpy as np
import pytest

from ecn_dist.errors import UserError
from ecn_dist.packing.layouts import read_dataset
from ecn_dist.packing.records import Dataset, queries_without_match
from tests.dataset_folders import write_market


def touch(root: Path, *names: str) -> Path:
    """Empty files: reading a layout opens no picture."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def contents(dataset: Dataset, split: str) -> list[tuple[str, int, int]]:
    return [(record.file, record.pid, dataset.camids[record.camera]) for record in dataset.splits[split]]


def test_market(tmp_path: Path) -> None:
    dataset = read_dataset("market", write_market(tmp_path, identities=2, cameras=2))
    assert contents(dataset, "train")[:3] == [
        ("0001_c1s1_000000_00.jpg", 1, 0),
        ("0001_c1s1_000001_00.jpg", 1, 0),
        ("0001_c2s1_000000_00.jpg", 1, 1),
    ]
    assert contents(dataset, "gallery") == [
        ("0000_c1s1_000001_00.jpg", 0, 0),
        ("0000_c2s1_000002_00.jpg", 0, 1),
        ("0101_c1s1_000000_00.jpg", 101, 0),
        ("0101_c2s1_000000_00.jpg", 101, 1),
        ("0102_c1s1_000000_00.jpg", 102, 0),
        ("0102_c2s1_000000_00.jpg", 102, 1),
    ]
    assert dataset.junk == {"train": 0, "query": 0, "gallery": 1}
    assert dataset.distractors == 2
    assert dataset.ignored == ("bounding_box_test/Thumbs.db",)
    assert all(Path(record.path).is_file() for split in dataset.splits.values() for record in split)


def test_duke_and_msmt17_names(tmp_path: Path) -> None:
    touch(tmp_path, "bounding_box_train/0001_c2_f0046302.jpg", "bounding_box_train/0000_c14_0012.jpg")
    for layout in ("duke", "msmt17"):
        dataset = read_dataset(layout, tmp_path)
        assert contents(dataset, "train") == [("0000_c14_0012.jpg", 0, 1), ("0001_c2_f0046302.jpg", 1, 0)]
        assert dataset.distractors == 0


def test_cameras_are_numbered_by_number_over_all_splits(tmp_path: Path) -> None:
    names = [f"bounding_box_train/0001_c{camera}s1_000000_00.jpg" for camera in (10, 9, 2)]
    touch(tmp_path, *names, "query/0002_c1s1_000000_00.jpg", "bounding_box_test/0002_c2s1_000000_00.jpg")
    dataset = read_dataset("market", tmp_path)
    assert dataset.cameras == ("1", "2", "9", "10")
    assert [camid for _, _, camid in contents(dataset, "train")] == [3, 1, 2]


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    strange = [f"bounding_box_train/person{number}.jpg" for number in range(7)]
    touch(tmp_path, "bounding_box_train/0001_c1s1_000000_00.jpg", *strange)
    with pytest.raises(UserError, match=r"7 fit no name of layout market .*person0\.jpg, .*person4\.jpg and 2 more"):
        read_dataset("market", tmp_path)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "bounding_box_train/0001_c1s1_000000_00.jpg", "bounding_box_train/._0001_c1s1_000000_00.jpg")
    assert len(read_dataset("market", tmp_path).splits["train"]) == 1


def test_a_folder_without_market_folders_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/a.jpg", "readme.txt")
    with pytest.raises(UserError, match=r"none of the folders bounding_box_train.*it holds pictures, readme\.txt"):
        read_dataset("market", tmp_path)


def test_a_split_of_junk_has_no_identities(tmp_path: Path) -> None:
    touch(tmp_path, "bounding_box_train/-1_c1s1_000000_00.jpg", "bounding_box_train/-1_c2s1_000000_00.jpg")
    with pytest.raises(UserError, match=r"split 'train' .* no pictures with an identity \(all 2 .* pid -1"):
        read_dataset("market", tmp_path)


def test_query_and_gallery_go_together(tmp_path: Path) -> None:
    touch(tmp_path, "query/0001_c1s1_000000_00.jpg")
    with pytest.raises(UserError, match="splits found: query"):
        read_dataset("market", tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data set folder"):
        read_dataset("market", tmp_path / "nowhere")
    with pytest.raises(UserError, match="a pattern or table goes with layout folder"):
        read_dataset("market", tmp_path, pattern="x")


@pytest.fixture
def msmt17(tmp_path: Path) -> Path:
    lists = {
        "list_train.txt": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_03_0303noon_0001_0.jpg 1"],
        "list_val.txt": ["0000/0000_001_15_0303morning_0010_0.jpg 0"],
        "list_query.txt": ["0000/0000_000_01_0302morning_0001_0.jpg 0"],
        "list_gallery.txt": ["0000/0000_001_03_0302morning_0001_0.jpg 0"],
    }
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        folder = "train" if name in ("list_train.txt", "list_val.txt") else "test"
        touch(tmp_path, *(f"{folder}/{line.split()[0]}" for line in lines))
    return tmp_path


def test_msmt17_original(msmt17: Path) -> None:
    dataset = read_dataset("msmt17-original", msmt17)
    assert dataset.cameras == ("1", "3", "15")
    assert contents(dataset, "train") == [
        ("0000/0000_000_01_0303morning_0008_0.jpg", 0, 0),
        ("0000/0000_001_15_0303morning_0010_0.jpg", 0, 2),
        ("0001/0001_000_03_0303noon_0001_0.jpg", 1, 1),
    ]
    assert [record.path for record in dataset.splits["query"]] == [
        str(msmt17 / "test/0000/0000_000_01_0302morning_0001_0.jpg")
    ]
    assert [len(dataset.splits[split]) for split in ("query", "gallery")] == [1, 1]


def test_msmt17_original_with_faults(msmt17: Path) -> None:
    with open(msmt17 / "list_val.txt", "a") as file:
        file.write("0000/0000_009_02_0303morning_0010_0.jpg 0\n")
    with pytest.raises(UserError, match=r"1 are listed, but not in .*: train/0000/0000_009_02"):
        read_dataset("msmt17-original", msmt17)
    (msmt17 / "list_val.txt").write_text("0000/0000_009_02_0303morning_0010_0.jpg\n")
    with pytest.raises(UserError, match="1 are no list entries"):
        read_dataset("msmt17-original", msmt17)
    (msmt17 / "list_val.txt").unlink()
    with pytest.raises(UserError, match=r"list_val\.txt is missing"):
        read_dataset("msmt17-original", msmt17)


def test_pattern_without_identities_is_a_target(tmp_path: Path) -> None:
    touch(tmp_path, "entrance/1.jpg", "entrance/2.png", "till/1.jpg", "notes.txt")
    dataset = read_dataset("folder", tmp_path, pattern=r"^(?P<camid>\w+)/")
    assert dataset.cameras == ("entrance", "till")
    assert contents(dataset, "train") == [("entrance/1.jpg", -1, 0), ("entrance/2.png", -1, 0), ("till/1.jpg", -1, 1)]
    assert dataset.ignored == ("notes.txt",)


def test_pattern_with_splits_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/x_c1.jpg", "train/7_c02.jpg", "query/8_c1.jpg", "bounding_box_test/8_c2.jpg")
    dataset = read_dataset("folder", tmp_path, pattern=r"/(?:(?P<pid>\d+)|x)_c(?P<camid>\d+)")
    assert contents(dataset, "train") == [("train/7_c02.jpg", 7, 1), ("train/x_c1.jpg", -1, 0)]
    assert contents(dataset, "query") == [("query/8_c1.jpg", 8, 0)]
    assert contents(dataset, "gallery") == [("bounding_box_test/8_c2.jpg", 8, 1)]
    touch(tmp_path, "elsewhere/8_c2.jpg")
    with pytest.raises(UserError, match=r"1 do not fit the pattern .*: elsewhere/8_c2\.jpg"):
        read_dataset("folder", tmp_path, pattern=r"/(?:(?P<pid>\d+)|x)_c(?P<camid>\d+)")


def test_pattern_with_a_split_group(tmp_path: Path) -> None:
    touch(tmp_path, "1-1-train.jpg", "2-1-query.jpg", "2-2-gallery.jpg")
    dataset = read_dataset("folder", tmp_path, pattern=r"(?P<pid>\d+)-(?P<camid>\d+)-(?P<split>\w+)")
    assert {split: len(records) for split, records in dataset.splits.items()} == {"train": 1, "query": 1, "gallery": 1}


def test_unknown_people_cannot_be_queries(tmp_path: Path) -> None:
    touch(tmp_path, "train/c1.jpg", "query/c1.jpg", "gallery/c2.jpg")
    with pytest.raises(UserError, match=r"split 'query' .* no pictures with an identity"):
        read_dataset("folder", tmp_path, pattern=r"c(?P<camid>\d)")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        (r"(?P<pid>\d+)", r"needs the named group .*; its named groups: pid"),
        (r"(?P<camid>\d+)_(?P<person>\d+)", "needs the named group .*; its named groups: camid, person"),
        (r"(?P<camid>\d+)_(?P<pid>x)", "1 do not fit the pattern"),
        (None, "either a pattern or a table"),
    ],
)
def test_patterns_that_will_not_do(tmp_path: Path, pattern: str | None, message: str) -> None:
    touch(tmp_path, "1_x.jpg")
    with pytest.raises(UserError, match=message):
        read_dataset("folder", tmp_path, pattern=pattern)


def test_table(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b/c.png", "q.jpg", "g.jpg")
    table = tmp_path / "table.csv"
    lines = [
        "path,pid,camid,split",
        "b/c.png,,roof,",
        "a.jpg,5,door,train",
        "q.jpg,6,door,query",
        "g.jpg,6,roof,gallery",
    ]
    table.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    dataset = read_dataset("folder", tmp_path, table=table)
    assert contents(dataset, "train") == [("a.jpg", 5, 0), ("b/c.png", -1, 1)]
    assert contents(dataset, "query") == [("q.jpg", 6, 0)]
    assert dataset.cameras == ("door", "roof")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,pid\na.jpg,1\n", "needs the columns path and camid"),
        ("path,camid,pid\na.jpg,1,Ann\n", "1 of .* need .* line 2"),
        ("path,camid,split\na.jpg,1,valid\n", "1 of .* need .* line 2"),
        ("path,camid\na.jpg\n", "1 of .* need .* line 2"),
        ("path,camid\na.jpg,1\nb.jpg,1\n", r"1 are in .*, but not below .*: b\.jpg"),
        ("path,camid\na.jpg,1\na.jpg,2\n", r"names pictures more than once: a\.jpg"),
        ("path,camid\na.jpg,1\nb/../a.jpg,2\n", r"names pictures more than once: a\.jpg"),
        ("path,camid,pid,split\na.jpg,till, 3,,train\n", "1 of .* need .* line 2"),
        ("path,camid\n../a.jpg,1\n", "1 of .* need a path below .* line 2"),
        ("path,camid\n/etc/a.jpg,1\n", "1 of .* need a path below .* line 2"),
        (f"path,camid\na.jpg,{'1' * 5000}\n", "1 of .* need .* line 2"),
        (f"path,camid\na.jpg,{'x' * 200_000}\n", "is no CSV table, after line 1: field larger"),
    ],
)
def test_tables_that_will_not_do(tmp_path: Path, text: str, message: str) -> None:
    table = touch(tmp_path, "a.jpg") / "table.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        read_dataset("folder", tmp_path, table=table)


def test_style_copies_are_no_pictures_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "c1/a.jpg", "bounding_box_train_camstyle/c1/a_fake_1to2.jpg")
    dataset = read_dataset("folder", tmp_path, pattern=r"c(?P<camid>\d)")
    assert contents(dataset, "train") == [("c1/a.jpg", -1, 0)]
    assert dataset.styles_folder == tmp_path / "bounding_box_train_camstyle"


def test_queries_without_match() -> None:
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(3)
    query_pids, gallery_pids = rng.integers(0, 30, 60), rng.integers(0, 30, 40)
    query_camids, gallery_camids = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    expected = [
        not ((gallery_pids == pid) & (gallery_camids != camid)).any()
        for pid, camid in zip(query_pids, query_camids, strict=True)
    ]
    assert 0 < sum(expected) < 60
    query = [*zip(query_pids.tolist(), query_camids.tolist(), strict=True)]
    gallery = [*zip(gallery_pids.tolist(), gallery_camids.tolist(), strict=True)]
    assert queries_without_match(query, gallery, 3) == [*compress(query, expected)]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "c1/1.jpg", "c3/3.jpg")
    (data / "c2").symlink_to(touch(tmp_path / "elsewhere", "2.jpg"))
    (data / "c1" / "loop").symlink_to(data)
    (data / "a_c3").symlink_to(data / "c3")
    dataset = read_dataset("folder", data, pattern=r"^c(?P<camid>\d)/")
    assert contents(dataset, "train") == [("c1/1.jpg", -1, 0), ("c2/2.jpg", -1, 1), ("c3/3.jpg", -1, 2)]
    left_out = "(a link to a folder that is there already)"
    assert dataset.ignored == (f"a_c3 {left_out}", f"c1/loop {left_out}")


@pytest.mark.parametrize(("layout", "folder"), [("folder", "c2"), ("market", "query")])
def test_folders_that_may_not_be_read(
    tmp_path: Path, layout: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights do not bind the tests where root runs them, so the system's answer is given here."""
    touch(tmp_path, "c1/1.jpg", f"{folder}/0001_c1.jpg")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=rf"Permission denied: '.*{folder}'"):
        read_dataset(layout, tmp_path, pattern=r"c(?P<camid>\d)" if layout == "folder" else None)


@pytest.mark.parametrize("layout", ["folder", "market"])
def test_pipes_are_no_pictures(tmp_path: Path, layout: str) -> None:
    touch(tmp_path, "bounding_box_train/0001_c1s1_000000_00.jpg")
    os.mkfifo(tmp_path / "bounding_box_train" / "0002_c1s1_000000_00.jpg")
    dataset = read_dataset(layout, tmp_path, pattern=r"c(?P<camid>\d)" if layout == "folder" else None)
    assert len(dataset.splits["train"]) == 1
    assert dataset.ignored == ("bounding_box_train/0002_c1s1_000000_00.jpg",)


@pytest.mark.parametrize(
    "line",
    [
        f"0000/0000_000_01_0303morning_0008_0.jpg {2**63}",
        f"0000/0000_000_{'1' * 5000}_0303morning_0008_0.jpg 1",
        "../0000_000_01_0303morning_0008_0.jpg 1",
        f"{'x' * 5000}/0000_000_01_0303morning_0008_0.jpg 1",
    ],
    ids=["pid", "camera", "outside", "long"],
)
def test_hostile_list_entries(msmt17: Path, line: str) -> None:
    with open(msmt17 / "list_val.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"1 are (no list entries|listed, but not in)"):
        read_dataset("msmt17-original", msmt17)


def test_lists_and_tables_that_are_not_utf_8(msmt17: Path) -> None:
    (msmt17 / "list_val.txt").write_bytes("Jürgen.jpg 1".encode("latin-1"))
    with pytest.raises(UserError, match=r"list_val\.txt is not UTF-8 text \(byte 1\)"):
        read_dataset("msmt17-original", msmt17)
    (msmt17 / "table.csv").write_bytes("path,camid".encode("utf-16"))
    with pytest.raises(UserError, match=r"table\.csv is not UTF-8 text"):
        read_dataset("folder", msmt17, table=msmt17 / "table.csv")


@pytest.mark.parametrize("splits", [("train", "gallery"), ("train", "query"), ("query", "gallery")])
def test_one_picture_in_two_splits(tmp_path: Path, splits: tuple[str, str]) -> None:
    names = {"train": "a.jpg", "query": "b.jpg", "gallery": "c.jpg"}
    table = touch(tmp_path, *names.values()) / "table.csv"
    rows = [f"{name},1,1,{split}" for split, name in names.items()]
    table.write_text("\n".join(["path,camid,pid,split", *rows, f"./{names[splits[0]]},1,1,{splits[1]}"]))
    with pytest.raises(UserError, match=rf"1 are .* at once.*: {names[splits[0]]}"):
        read_dataset("folder", tmp_path, table=table)
