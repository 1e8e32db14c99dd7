"""Augmentation: the draws, the boxes they give, and the quick way against the picture-by-picture definition."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from ecn_dist.data import transforms
from ecn_dist.data.draws import Draws, philox
from tests.augment import augment_picture, prepare_picture

GREY_LEVEL = 1 / 255 / min(transforms.IMAGENET_STD)  # after normalisation
GOLDEN_UNIFORMS = [0.06774806790053844, 0.792107360670343]
GOLDEN_PERMUTATION = [0, 4, 2, 5, 1, 3]
SIZES = [(128, 64), (256, 128), (97, 41), (300, 150), (64, 128), (40, 300)]


def draws_of(count: int, purpose: str = "augmentation", numbers: int = transforms.NUM_DRAWS) -> list[list[float]]:
    return Draws(0, "target", purpose).uniforms(numbers, (0, np.arange(count), 0)).tolist()


def erase_draws_of(count: int) -> list[list[float]]:
    return draws_of(count, "erasing", transforms.NUM_ERASE_DRAWS)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: str, key: str, words: str) -> None:
    counter_4 = tuple(np.array([int(word, 16)], dtype=np.uint64) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word.item():08x}" for word in philox(counter_4, (k0, k1))] == words.split()


def test_draws_are_a_function_of_their_address_and_those_of_earlier_versions() -> None:
    """A resumed run relies on it. If these must change, checkpoints of older versions must be refused."""
    draws = Draws(3, "source", "augmentation")
    assert draws.uniforms(2, (0, 17, 4)).tolist() == [GOLDEN_UNIFORMS]
    assert draws.uniforms(9, (0, 17, 4))[0, :2].tolist() == GOLDEN_UNIFORMS
    assert draws.uniforms(2, (0, np.array([3, 17]), 4))[1].tolist() == GOLDEN_UNIFORMS
    assert draws.permutation(6, (1, 0, 2)).tolist() == GOLDEN_PERMUTATION


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutations_are_uniform(count: int) -> None:
    draws = Draws(0, "target", "window")
    orders = np.stack([draws.permutation(count, (0, 0, number)) for number in range(400)])
    assert (np.sort(orders, axis=1) == np.arange(count)).all()
    assert np.abs(orders.mean(axis=0) - (count - 1) / 2).max() <= count * 5 / 12**0.5 / 20
    numbers = [draws.integer(count, (0, number, 0)) for number in range(400)]
    assert set(numbers) <= set(range(count))
    assert np.mean(numbers) == pytest.approx((count - 1) / 2, abs=count * 0.08)


def test_addresses_purposes_domains_and_seeds_draw_independently() -> None:
    rows = [
        Draws(seed, domain, purpose).uniforms(1000, address)[0]
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


def test_erased_boxes_have_the_published_areas_and_aspects() -> None:
    boxes = np.array([transforms.erase_box(draws, 256, 128) for draws in erase_draws_of(2000)])
    top, left, height, width = boxes.T
    area, aspect = height * width / (256 * 128), height / width
    assert 0.018 < area.min() < 0.03
    assert 0.18 < area.max() < 0.202
    assert 0.28 < aspect.min() < 0.4
    assert 2.8 < aspect.max() < 3.1
    assert top.min() == left.min() == 0
    assert (top + height).max() == 256
    assert (left + width).max() == 128


def test_where_no_box_fits_nothing_is_erased() -> None:
    assert transforms.erase_box([1.0] * transforms.NUM_ERASE_DRAWS, 300, 4) == transforms.NO_BOX


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_pictures_are_erased_as_often_as_asked_for(probability: float) -> None:
    fill = torch.tensor(transforms.ECN.erase_fill).view(3, 1, 1)
    erased = [
        (augment_picture(picture(32, 16), draws, erase, 32, 16, probability) == fill).all(dim=0).any()
        for draws, erase in zip(draws_of(400), erase_draws_of(400), strict=True)
    ]
    assert np.mean(erased) == pytest.approx(probability, abs=0.08)


def test_cameras_and_flips_are_drawn_evenly() -> None:
    draws = draws_of(6000)
    cameras = np.bincount(transforms.draw_camera(np.array(draws)[:, transforms.CAMERA], 6), minlength=6)
    assert len(cameras) == 6
    assert np.abs(cameras / 1000 - 1).max() < 0.15
    assert np.mean([row[transforms.FLIP] < transforms.FLIP_PROBABILITY for row in draws]) == pytest.approx(
        0.5, abs=0.03
    )


def test_the_definition_is_what_torchvision_computes() -> None:
    for index, (draws, erase_draws) in enumerate(zip(draws_of(40), erase_draws_of(40), strict=True)):
        height, width = SIZES[index % len(SIZES)]
        image = functional.to_tensor(
            functional.resized_crop(picture(height, width), *transforms.crop_box(draws, height, width), [64, 32])
        )
        if draws[transforms.FLIP] < 0.5:
            image = functional.hflip(image)
        image = functional.normalize(image, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
        if draws[transforms.ERASE] < 0.5:
            box = transforms.erase_box(erase_draws, 64, 32)
            image = functional.erase(image, *box, torch.tensor(transforms.ECN.erase_fill).view(3, 1, 1))
        defined = augment_picture(picture(height, width), draws, erase_draws, 64, 32, 0.5)
        torch.testing.assert_close(defined, image)


@pytest.mark.parametrize("size", SIZES)
def test_the_quick_way_agrees_with_the_definition_within_two_grey_levels(size: tuple[int, int]) -> None:
    draws = draws_of(40)
    pictures = [picture(*size, seed) for seed in range(len(draws))]
    pixels_bHW3 = torch.empty(len(draws), 128, 64, 3, dtype=torch.uint8)
    for out_HW3, stored, row in zip(pixels_bHW3, pictures, draws, strict=True):
        box, flip = transforms.crop_box(row, *size), row[transforms.FLIP] < transforms.FLIP_PROBABILITY
        transforms.resize_into(out_HW3, np.array(stored), box, flip)
    erase = erase_draws_of(len(draws))
    boxes = [transforms.erase_box(row, 128, 64) if at % 2 else transforms.NO_BOX for at, row in enumerate(erase)]
    quick = transforms.normalise_and_erase(pixels_bHW3, torch.tensor(boxes))
    exact = torch.stack(
        [
            augment_picture(stored, row, erase_row, 128, 64, at % 2)
            for at, (stored, row, erase_row) in enumerate(zip(pictures, draws, erase, strict=True))
        ]
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
    assert (quick - prepare_picture(stored, 128, 64)).abs().max() < 2.02 * GREY_LEVEL


def test_a_picture_does_not_depend_on_its_batch() -> None:
    pixels_bHW3 = torch.randint(0, 256, (7, 33, 17, 3), dtype=torch.uint8)
    together = transforms.normalise_and_erase(pixels_bHW3)
    for at in range(7):
        assert torch.equal(transforms.normalise_and_erase(pixels_bHW3[at : at + 1])[0], together[at])


def test_the_mask_that_accelerators_erase_by_is_the_boxes() -> None:
    boxes = [transforms.erase_box(row, 64, 32) for row in erase_draws_of(30)] + [transforms.NO_BOX, (0, 0, 64, 32)]
    expected = torch.zeros(len(boxes), 64, 32, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(expected, boxes, strict=True):
        mask[top : top + height, left : left + width] = True
    assert torch.equal(transforms.box_mask(torch.tensor(boxes), 64, 32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [transforms.ECN, transforms.Augmentation("pad")])
def test_an_accelerator_gives_the_same_pictures(how: transforms.Augmentation) -> None:
    pixels_bHW3 = torch.randint(0, 256, (30, 64, 32, 3), dtype=torch.uint8)
    boxes = torch.tensor([transforms.erase_box(row, 64, 32, how) for row in erase_draws_of(30)])
    there = transforms.normalise_and_erase(pixels_bHW3.to("cuda"), boxes.to("cuda"), how)
    assert torch.equal(there.cpu(), transforms.normalise_and_erase(pixels_bHW3, boxes, how))
