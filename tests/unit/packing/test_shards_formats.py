"""Packing pictures that are no plain JPEGs, or larger than wanted."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecn_dist.errors import UserError
from tests.dataset_folders import jpeg_bytes, member, pack_folder, picture, write_market, write_picture


def stored_picture(root: Path, output: Path, **options) -> bytes:  # the options of pack
    split = pack_folder(root, output, **options).split("train")
    return member(split, split.members[0], split.num_cameras)


def test_other_formats_become_jpeg(tmp_path: Path) -> None:
    image = picture((5,))
    (tmp_path / "data/bounding_box_train").mkdir(parents=True)
    image.save(tmp_path / "data/bounding_box_train/0001_c1s1_000000_00.png")
    stored = Image.open(BytesIO(stored_picture(tmp_path / "data", tmp_path / "shards")))
    assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", image.size)
    assert np.abs(np.asarray(stored, dtype=float) - np.asarray(image, dtype=float)).mean() < 4


def test_turned_and_unusual_jpegs_are_encoded_anew_and_grey_ones_kept(tmp_path: Path) -> None:
    name = "bounding_box_train/0001_c1s1_000000_00.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    write_picture(tmp_path / "turned" / name, (5,), exif=exif)
    assert Image.open(BytesIO(stored_picture(tmp_path / "turned", tmp_path / "a"))).size == (32, 16)
    write_picture(tmp_path / "cmyk" / name, (5,))
    (tmp_path / "cmyk" / name).write_bytes(jpeg_bytes(picture((5,)).convert("CMYK")))
    assert Image.open(BytesIO(stored_picture(tmp_path / "cmyk", tmp_path / "b"))).mode == "RGB"
    write_picture(tmp_path / "grey" / name, (5,))
    (tmp_path / "grey" / name).write_bytes(jpeg_bytes(picture((5,)).convert("L")))
    assert stored_picture(tmp_path / "grey", tmp_path / "c") == (tmp_path / "grey" / name).read_bytes()


def test_max_size_keeps_the_shape_and_smaller_pictures(tmp_path: Path) -> None:
    root = write_market(tmp_path / "data", splits=["train"], identities=1, cameras=1)
    file = root / "bounding_box_train/0001_c1s1_000000_00.jpg"
    assert stored_picture(root, tmp_path / "a", max_size=(32, 16)) in [
        path.read_bytes() for path in file.parent.iterdir()
    ]
    assert Image.open(BytesIO(stored_picture(root, tmp_path / "b", max_size=(16, 100)))).size == (8, 16)


@pytest.mark.parametrize(("size", "options"), [((1, 1), {}), ((40, 1), {}), ((64, 64), {"max_size": (1, 1)})])
def test_pictures_of_which_nothing_can_be_cropped(tmp_path: Path, size: tuple[int, int], options: dict) -> None:
    (tmp_path / "data/bounding_box_train").mkdir(parents=True)
    picture((5,), *size).save(tmp_path / "data/bounding_box_train/0001_c1s1_000000_00.png")
    with pytest.raises(UserError, match=r"1 pictures cannot be read: .* x 1 pixels"):
        pack_folder(tmp_path / "data", tmp_path / "shards", **options)
