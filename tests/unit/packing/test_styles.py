"""Histogram style copies: the curves undo what cameras did."""

import numpy as np
import pytest
from PIL import Image

from ecn_dist.packing.styles import in_styles, picture_histogram, style_tables

rng = np.random.default_rng(7)
SCENES = rng.integers(0, 120, (20, 16, 8, 3), dtype=np.uint8)


def seen_by(camera: np.ndarray) -> list[Image.Image]:
    """The scenes through a camera: a (3, 256) curve for each channel."""
    return [Image.fromarray(np.stack([camera[k][scene[..., k]] for k in range(3)], axis=-1)) for scene in SCENES]


def histogram_of(images: list[Image.Image]) -> np.ndarray:
    return np.sum([picture_histogram(image) for image in images], axis=0)


VALUES = np.arange(256)
PLAIN = np.stack([VALUES] * 3).astype(np.uint8)
BRIGHT = np.stack([np.minimum(255, 2 * VALUES), VALUES + VALUES // 4, VALUES]).clip(0, 255).astype(np.uint8)
DARK = np.stack([VALUES // 2, VALUES // 3, VALUES]).astype(np.uint8)


def test_histogram_counts_each_channel() -> None:
    image = seen_by(PLAIN)[0]
    expected = [np.bincount(np.asarray(image)[..., k].ravel(), minlength=256) for k in range(3)]
    assert np.array_equal(picture_histogram(image), expected)


def test_a_cameras_curve_is_found_exactly() -> None:
    """Where a camera maps values one to one, the copies of the other camera's pictures are its own pictures."""
    plain, bright = seen_by(PLAIN), seen_by(BRIGHT)
    tables = style_tables(np.stack([histogram_of(plain), histogram_of(bright)]))
    for original, expected in zip(plain, bright, strict=True):
        assert np.array_equal(in_styles(original, tables[0], [1])[1], expected)
    for original, expected in zip(bright, plain, strict=True):
        assert np.array_equal(in_styles(original, tables[1], [0])[0], expected)


def test_a_cameras_lost_values_come_back_within_their_range() -> None:
    """A camera that merges values (v // 3) cannot be undone exactly: the middle of what it merged is the answer."""
    plain, dark = seen_by(PLAIN), seen_by(DARK)
    tables = style_tables(np.stack([histogram_of(plain), histogram_of(dark)]))
    for original, expected in zip(dark, plain, strict=True):
        restored = np.asarray(in_styles(original, tables[1], [0])[0]).astype(int)
        assert np.abs(restored - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("seed", [0, 1])
def test_tables_never_decrease_and_keep_the_own_camera(seed: int) -> None:
    histograms = np.random.default_rng(seed).integers(0, 50, (4, 3, 256))
    histograms[1, :, 10:200] = 0  # values that no picture of the camera has
    histograms[2] = 0
    histograms[2, :, 77] = 5  # one value alone
    tables = style_tables(histograms)
    assert (np.diff(tables.astype(int), axis=-1) >= 0).all()
    for camera in range(4):
        assert np.array_equal(tables[camera, camera], PLAIN)
    assert (tables[:2, 2] == 77).all()


def test_matching_agrees_with_sorted_pixels() -> None:
    """Of equally many pixels the n-th smallest becomes the n-th smallest; equal ones their mean, within rounding."""
    source, target = (rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(2))
    target = (target // 2 + 60).astype(np.uint8)
    images = [Image.fromarray(source), Image.fromarray(target)]
    tables = style_tables(np.stack([picture_histogram(image) for image in images]))
    for k in range(3):
        by_rank = np.sort(target[..., k].ravel())
        ordered = np.sort(source[..., k].ravel())
        for value in np.unique(ordered):
            expected = by_rank[ordered == value].mean()
            assert abs(float(tables[0, 1, k, value]) - expected) <= 1.0
