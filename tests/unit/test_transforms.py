"""Augmentation: the draws, the boxes they give, and the quick way against the picture-by-picture definition."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from ecn_dist.data import transforms
from ecn_dist.data.draws import Draws

GREY_LEVEL = 1 / 255 / min(transforms.IMAGENET_STD)  # after normalisation
GOLDEN_UNIFORMS = [0.6423059231901709, 0.12965984002479947]
GOLDEN_PERMUTATION = [5, 2, 3, 1, 4, 0]
SIZES = [(128, 64), (256, 128), (97, 41), (300, 150), (64, 128), (40, 300)]


def draws_of(count: int, purpose: str = "augmentation") -> list[list[float]]:
    draws = Draws(0, "target", purpose)
    return [draws.uniforms(transforms.NUM_DRAWS, (0, index, 0)).tolist() for index in range(count)]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_draws_are_a_function_of_their_address_and_those_of_earlier_versions() -> None:
    """A resumed run relies on it. If these must change, checkpoints of older versions must be refused."""
    draws = Draws(3, "source", "augmentation")
    assert draws.uniforms(2, (0, 17, 4)).tolist() == GOLDEN_UNIFORMS
    assert draws.permutation(6, (1, 0, 2)).tolist() == GOLDEN_PERMUTATION
    assert draws.uniforms(9, (0, 17, 4))[:2].tolist() == GOLDEN_UNIFORMS


def test_addresses_purposes_domains_and_seeds_draw_independently() -> None:
    rows = [
        Draws(seed, domain, purpose).uniforms(1000, address)
        for seed in (0, 1)
        for domain in ("source", "target")
        for purpose in ("window", "augmentation")
        for address in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))
    ]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.15
    assert np.concatenate(rows).mean() == pytest.approx(0.5, abs=0.01)
    assert 0 <= np.concatenate(rows).min() < np.concatenate(rows).max() < 1


def test_crops_have_the_published_areas_and_aspects_and_reach_every_place() -> None:
    height, width = 128, 64
    boxes = np.array([transforms.crop_box(draws, height, width) for draws in draws_of(3000)])
    top, left, box_height, box_width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    cropped = (box_height < height) | (box_width < width)
    assert 0.9 < cropped.mean() < 1
    area, aspect = (box_height * box_width / (height * width))[cropped], (box_height / box_width)[cropped]
    assert 0.62 < area.min() < 0.65
    assert area.max() > 0.9
    assert 1.95 < aspect.min() < 2.03
    assert 2.8 < aspect.max() <= 3.07
    assert top.min() == left.min() == 0
    assert (top + box_height).max() == height
    assert (left + box_width).max() == width


def test_a_picture_that_no_crop_fits_is_taken_whole() -> None:
    assert {transforms.crop_box(draws, 64, 128) for draws in draws_of(50)} == {(0, 0, 64, 128)}


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_erased_boxes_have_the_published_areas_and_aspects(probability: float) -> None:
    boxes = np.array([transforms.erase_box(draws, probability, 256, 128) for draws in draws_of(2000)])
    top, left, height, width = boxes[boxes[:, 2] > 0].T
    assert len(top) / len(boxes) == pytest.approx(probability, abs=0.04)
    if probability:
        area, aspect = height * width / (256 * 128), height / width
        assert 0.018 < area.min() < 0.03
        assert 0.18 < area.max() < 0.202
        assert 0.28 < aspect.min() < 0.4
        assert 2.8 < aspect.max() < 3.1
        assert (top + height <= 256).all()
        assert (left + width <= 128).all()


def test_cameras_and_flips_are_drawn_evenly() -> None:
    draws = draws_of(6000)
    cameras = np.bincount(transforms.draw_camera(np.array(draws), 6), minlength=6)
    assert len(cameras) == 6
    assert np.abs(cameras / 1000 - 1).max() < 0.15
    assert np.mean([row[transforms.FLIP] < transforms.FLIP_PROBABILITY for row in draws]) == pytest.approx(
        0.5, abs=0.03
    )


def test_the_definition_is_what_torchvision_computes() -> None:
    for index, draws in enumerate(draws_of(40)):
        height, width = SIZES[index % len(SIZES)]
        image = functional.to_tensor(
            functional.resized_crop(picture(height, width), *transforms.crop_box(draws, height, width), [64, 32])
        )
        if draws[transforms.FLIP] < 0.5:
            image = functional.hflip(image)
        image = functional.normalize(image, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
        box = transforms.erase_box(draws, 0.5, 64, 32)
        if box[2]:
            image = functional.erase(image, *box, torch.tensor(transforms.ERASE_FILL).view(3, 1, 1))
        torch.testing.assert_close(transforms.augment_picture(picture(height, width), draws, 64, 32, 0.5), image)


@pytest.mark.parametrize("size", SIZES)
def test_the_quick_way_agrees_with_the_definition_within_two_grey_levels(size: tuple[int, int]) -> None:
    draws = draws_of(40)
    pictures = [picture(*size, seed) for seed in range(len(draws))]
    pixels_bHW3 = torch.empty(len(draws), 128, 64, 3, dtype=torch.uint8)
    for out_HW3, stored, row in zip(pixels_bHW3, pictures, draws, strict=True):
        box, flip = transforms.crop_box(row, *size), row[transforms.FLIP] < transforms.FLIP_PROBABILITY
        transforms.resize_into(out_HW3, np.array(stored), box, flip)
    boxes = [transforms.erase_box(row, 0.5, 128, 64) for row in draws]
    quick = transforms.normalise_and_erase(pixels_bHW3, boxes)
    exact = torch.stack(
        [transforms.augment_picture(p, row, 128, 64, 0.5) for p, row in zip(pictures, draws, strict=True)]
    )
    difference = (quick - exact).abs()
    assert difference.max() < 2.02 * GREY_LEVEL
    assert difference.mean() < 0.2 * GREY_LEVEL


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_pictures_agree_with_the_definition_within_two_grey_levels(size: tuple[int, int]) -> None:
    stored = picture(*size)
    pixels_bHW3 = torch.empty(1, 128, 64, 3, dtype=torch.uint8)
    transforms.resize_into(pixels_bHW3[0], np.array(stored))
    quick = transforms.normalise_and_erase(pixels_bHW3)[0]
    assert (quick - transforms.prepare_picture(stored, 128, 64)).abs().max() < 2.02 * GREY_LEVEL


def test_a_picture_does_not_depend_on_its_batch() -> None:
    pixels_bHW3 = torch.randint(0, 256, (7, 33, 17, 3), dtype=torch.uint8)
    together = transforms.normalise_and_erase(pixels_bHW3)
    for at in range(7):
        assert torch.equal(transforms.normalise_and_erase(pixels_bHW3[at : at + 1])[0], together[at])
