"""Picture files of every depth as RGB of 8 bits, and the words about those that are none."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecn_dist.data import pictures, reader
from ecn_dist.packing.shards import _read


def as_file(values: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def infrared(height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(20_000, 60_000, (height, width)).astype(np.uint16)


def eight_bits(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_range(file_format: str) -> None:
    values = infrared()
    values[0, :4] = 0, 128, 129, 65535
    picture = pictures.decode(as_file(values, file_format))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), eight_bits(values))
    assert np.asarray(picture)[0, :4, 0].tolist() == [0, 0, 1, 255]


def test_16_bit_grey_of_either_byte_order_is_turned_upright() -> None:
    values = infrared()
    for mode, kind in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")):
        picture = Image.frombytes(mode, values.shape[::-1], values.astype(kind).tobytes())
        np.testing.assert_array_equal(np.asarray(pictures.to_rgb(picture)), eight_bits(values))
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = 6
    turned = pictures.decode(as_file(values, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(eight_bits(values), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_8_bit_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    np.testing.assert_array_equal(np.asarray(pictures.to_rgb(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_an_unknown_range_is_named_with_file_and_mode(kind: type, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "depth.tif"
    path.write_bytes(as_file(infrared().astype(kind), "TIFF"))
    with pytest.raises(pictures.UnreadablePicture, match=rf"depth\.tif .*mode {mode}, .*convert it to 8 or 16 bits"):
        _read(str(path), None)


def test_packed_16_bit_grey_is_a_jpeg_of_its_range() -> None:
    values = np.repeat(np.linspace(20_000, 60_000, 64).astype(np.uint16)[None], 64, axis=0)
    data, picture = pictures.as_stored(as_file(values, "PNG"))
    np.testing.assert_array_equal(np.asarray(picture), eight_bits(values))
    stored = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(stored - eight_bits(values)).max() <= 4


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_told_in_words(data: bytes) -> None:
    with pytest.raises(pictures.UnreadablePicture) as caught:
        pictures.decode(data)
    assert str(caught.value)
    assert "BytesIO" not in str(caught.value)
    assert "0x" not in str(caught.value)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("file_format", ["EPS", "GIF", "TGA", "PCX", "JPEG2000", "ICO"])
def test_only_the_formats_that_pack_takes_are_opened(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {called}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    data = POSTSCRIPT if file_format == "EPS" else as_file(np.zeros((32, 32, 3), np.uint8), file_format)
    for read in (pictures.decode, pictures.as_stored, reader.decode):
        with pytest.raises(pictures.UnreadablePicture, match="none of the formats JPEG, PNG, BMP, WEBP, TIFF, PPM"):
            read(data)
    assert not called.exists()


@pytest.mark.parametrize("file_format", pictures.FORMATS)
def test_pictures_too_small_or_too_large_are_refused(file_format: str) -> None:
    for height, width in ((1, 9), (9, 1)):
        data = as_file(np.zeros((height, width, 3), np.uint8), file_format)
        for read in (pictures.decode, pictures.as_stored, reader.decode):
            with pytest.raises(pictures.UnreadablePicture, match=f"it has {height} x {width} pixels; from 2 x 2 to"):
                read(data)
    assert reader.decode(as_file(np.zeros((2, 2, 3), np.uint8), file_format)).shape == (2, 2, 3)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_read(file_format: str) -> None:
    data = bytearray(as_file(np.zeros((8, 8, 3), np.uint8), file_format))
    if file_format == "PNG":
        data[16:24] = struct.pack(">II", 30_000, 30_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 30_000, 30_000)
    for read in (pictures.decode, reader.decode):
        with pytest.raises(pictures.UnreadablePicture, match=r"it has 30000 x 30000 pixels|decompression bomb"):
            read(bytes(data))
