"""Picture files of every depth as RGB of 8 bits, and the words about those that are none."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecn_dist.data import jpeg
from ecn_dist.packing.shards import _read


def as_file(values: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def infrared(height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(20_000, 60_000, (height, width)).astype(np.uint16)


def eight_bits(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_keeps_its_range(file_format: str) -> None:
    values = infrared()
    values[0, :4] = 0, 128, 129, 65535
    picture = jpeg.decode(as_file(values, file_format))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), eight_bits(values))
    assert np.asarray(picture)[0, :4, 0].tolist() == [0, 0, 1, 255]


def test_16_bit_grey_of_either_byte_order_is_turned_upright() -> None:
    values = infrared()
    for mode, kind in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")):
        picture = Image.frombytes(mode, values.shape[::-1], values.astype(kind).tobytes())
        np.testing.assert_array_equal(np.asarray(jpeg.to_rgb(picture)), eight_bits(values))
    exif = Image.Exif()
    exif[jpeg.EXIF_ORIENTATION] = 6
    turned = jpeg.decode(as_file(values, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(eight_bits(values), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_8_bit_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    np.testing.assert_array_equal(np.asarray(jpeg.to_rgb(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_an_unknown_range_is_named_with_file_and_mode(kind: type, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "depth.tif"
    path.write_bytes(as_file(infrared().astype(kind), "TIFF"))
    with pytest.raises(jpeg.UnreadablePicture, match=rf"depth\.tif .*mode {mode}, .*convert it to 8 or 16 bits"):
        _read(str(path), None)


def test_packed_16_bit_grey_is_a_jpeg_of_its_range() -> None:
    values = np.repeat(np.linspace(20_000, 60_000, 64).astype(np.uint16)[None], 64, axis=0)
    data, picture = jpeg.as_stored(as_file(values, "PNG"))
    np.testing.assert_array_equal(np.asarray(picture), eight_bits(values))
    stored = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(stored - eight_bits(values)).max() <= 4


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_told_in_words(data: bytes) -> None:
    with pytest.raises(jpeg.UnreadablePicture) as caught:
        jpeg.decode(data)
    assert str(caught.value)
    assert "BytesIO" not in str(caught.value)
    assert "0x" not in str(caught.value)
