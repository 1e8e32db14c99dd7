"""Reading members by offset, decoding them, and what is said when that fails."""

import errno
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from ecn_dist.data import reader as reader_module
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.pictures import UnreadablePicture
from ecn_dist.data.reader import ShardReader, check_shards, decode
from ecn_dist.data.stream import EvaluationStream
from ecn_dist.errors import UserError
from tests.tiny_shards import write_split


@pytest.fixture
def split(tmp_path: Path) -> SplitIndex:
    return write_split(tmp_path, [4, 3, 5], sizes=((32, 16), (41, 23)))


def read(reader: ShardReader, split: SplitIndex, row: int, slot: int) -> bytes:
    return reader.read_batch(split, [row], [slot])[0]


def overwrite(split: SplitIndex, row: int, slot: int, data: bytes) -> None:
    member = split.members[row]
    with open(split.shard_path(int(member["shard"])), "r+b") as file:
        file.seek(int(member["offset"][slot]))
        file.write(data)


def test_members_are_those_that_webdataset_reads(split: SplitIndex) -> None:
    reader = ShardReader()
    row = 0
    for shard in range(3):
        for sample in webdataset.WebDataset(split.shard_path(shard), shardshuffle=False):
            assert int(sample["__key__"]) == split.indices[row]
            for slot in range(4):
                name = "jpg" if slot == 3 else f"cam{slot:02d}.jpg"
                if name in sample:
                    assert read(reader, split, row, slot) == sample[name]
            row += 1
    assert row == len(split) == 12


def test_a_batch_comes_in_the_order_asked_for(split: SplitIndex) -> None:
    rows = [11, 0, 5, 0, 7, 3]
    slots = [3, 3, (split.members["camid"][5] + 1) % 3, 3, 3, 3]
    expected = [read(ShardReader(), split, row, slot) for row, slot in zip(rows, slots, strict=True)]
    assert ShardReader().read_batch(split, rows, slots) == expected


def jpeg(mode: str, size: tuple[int, int], **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, len(mode)), dtype=np.uint8).squeeze()
    data = io.BytesIO()
    Image.fromarray(pixels, mode).save(data, "JPEG", **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        jpeg("RGB", (128, 64)),
        jpeg("RGB", (37, 51), subsampling=2, quality=60),
        jpeg("RGB", (64, 32), progressive=True),
        jpeg("L", (64, 32)),
        jpeg("RGB", (16, 16), subsampling=0)[:-2] + b"stray bytes\xff\xd9",
        jpeg("RGB", (16, 16), keep_rgb=True),
        jpeg("CMYK", (16, 16)),
    ],
    ids=["plain", "odd", "progressive", "grey", "stray", "rgb", "cmyk"],
)
def test_decoded_pixels_are_those_of_pil(data: bytes) -> None:
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


# In front of the EXIF data: nothing, a comment that looks like the picture's segment, and a stray fill byte.
@pytest.mark.parametrize(
    "before", [b"", b"\xff\xfe\x00\x08\xff\xda\x00\x04..", b"\xff"], ids=["first", "comment", "fill"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_upright_whoever_packed_them(orientation: int, before: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg("RGB", (64, 32), exif=exif)
    data = data[:2] + before + data[2:]
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data), expected)


def test_a_picture_is_decoded_into_memory_that_is_large_enough() -> None:
    data = jpeg("RGB", (64, 32))
    for size, is_used in ((64 * 32 * 3, True), (64 * 32 * 3 - 1, False), (0, False)):
        buffer = np.empty(size, dtype=np.uint8)
        found = decode(data, buffer)
        assert np.array_equal(found, decode(data))
        assert np.shares_memory(found, buffer) == is_used


@pytest.mark.parametrize("data", [b"", b"no picture", jpeg("RGB", (64, 32))[:-200], jpeg("RGB", (64, 32))[200:]])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadablePicture):
        decode(data)


def test_a_picture_that_cannot_be_decoded_is_named(split: SplitIndex) -> None:
    row = 6
    overwrite(split, row, 3, b"\0" * 100)
    key = f"{split.indices[row]:06d}"
    with pytest.raises(
        UserError, match=rf"train-000001.tar: 00{key}.jpg \(sample {split.indices[row]} of split 'train'"
    ):
        ShardReader().read_picture(split, row)
    assert np.array_equal(
        ShardReader().read_picture(split, 5), np.array(Image.open(io.BytesIO(read(ShardReader(), split, 5, 3))))
    )


def test_a_shard_cut_short_and_a_shard_gone_are_named(split: SplitIndex) -> None:
    path = Path(split.shard_path(1))
    os.truncate(path, int(split.members["offset"][5][3]) + 10)
    reader = ShardReader()
    read(reader, split, 4, 3)
    with pytest.raises(UserError, match=r"train-000001.tar ends within the picture at byte"):
        read(reader, split, 5, 3)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001.tar cannot be read \(No such file"):
        read(ShardReader(), split, 4, 3)


def fail_to_read(split: SplitIndex, shard: int) -> None:
    """Put a file in a shard's place that can be opened, and gives an input/output error where a member would be."""
    path = Path(split.shard_path(shard))
    path.unlink()
    path.symlink_to("/proc/self/mem")  # whose first pages no process has


def test_a_shard_that_the_file_system_cannot_read_is_named(split: SplitIndex) -> None:
    fail_to_read(split, 1)
    with pytest.raises(
        UserError, match=r"train-000001.tar cannot be read \(Input/output error\)\. Copy the shard folder again"
    ):
        read(ShardReader(), split, 5, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_file_system_is_an_error_in_the_batch(split: SplitIndex, workers: int) -> None:
    for shard in range(3):
        fail_to_read(split, shard)
    batches = iter(EvaluationStream(split, height=32, width=16, batch_size=4, workers=workers))
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read \(Input/output error\)"):
        next(batches)


def test_few_shards_stay_open(split: SplitIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader()
    for row in [0, 5, 11, 1, 6, 10] * 3:
        read(reader, split, row, 3)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert read(reader, split, 0, 3)


def test_a_reader_that_is_pickled_opens_its_own_shards(split: SplitIndex) -> None:
    reader = ShardReader()
    read(reader, split, 0, 3)
    other = pickle.loads(pickle.dumps(reader))
    assert not other._open
    assert read(other, split, 0, 3) == read(reader, split, 0, 3)


def test_the_check_before_the_first_step_names_every_shard_that_changed(split: SplitIndex) -> None:
    check_shards(split, split)
    os.truncate(split.shard_path(0), 2048)
    Path(split.shard_path(2)).unlink()
    with pytest.raises(UserError) as caught:
        check_shards(split)
    text = str(caught.value)
    assert text.startswith("2 shards are missing or not what was packed")
    assert f"train-000000.tar: 2048 bytes, where the index says {split.shards[0].bytes}" in text
    assert "train-000001.tar" not in text
    assert "train-000002.tar: No such file" in text


def test_the_check_before_the_first_step_finds_shards_that_cannot_be_opened(
    split: SplitIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: str, *options: int) -> int:
        if path == split.shard_path(1):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)  # root would be let in
        return opened(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"1 shards are missing(?s:.*)train-000001.tar: Permission denied"):
        check_shards(split)
