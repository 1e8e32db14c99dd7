"""From a stored picture to network input, as formulas.md, "Training", says.

A decoded uint8 array is cropped, flipped and resized by torch's vectorised uint8 kernels (`resize_into`); scaling,
normalising and erasing are done in float32 for the whole batch, on the training device (`normalise_and_erase`).

All random choices of one sample come from uniform numbers of its own, always the same ones for the same choice:
NUM_DRAWS of them, which say the CAMERA's style, whether to FLIP and to ERASE, and from CROP_TRIES on 10 x (area,
aspect), then (top, left) of the try that fits ("pad" takes only (top, left), the first two); where something is erased
NUM_ERASE_DRAWS more, 100 x (area, aspect), then (top, left).

b pictures, H x W network input, h x w stored picture. A box is (top, left, height, width) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_AREA, CROP_ASPECT, MAX_CROP_TRIES = (0.64, 1.0), (2.0, 3.0), 10
ERASE_AREA_ASPECT = {"ecn": ((0.02, 0.2), (0.3, 3.0)), "pad": ((0.02, 0.4), (0.3, 1 / 0.3))}  # height / width
MAX_ERASE_TRIES = 100
FLIP_PROBABILITY = 0.5
PADDING = 10 / 256  # of the input's height

CAMERA, FLIP, ERASE, CROP_TRIES = range(4)
NUM_DRAWS = CROP_TRIES + 2 * MAX_CROP_TRIES + 2
NUM_ERASE_DRAWS = 2 * MAX_ERASE_TRIES + 2

Range = tuple[float, float]
Box = tuple[int, int, int, int]
NO_BOX: Box = (0, 0, 0, 0)


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied; each is flipped with probability 0.5, and normalised.

    "ecn" (formulas.md, Training): a random part of the picture, resized bilinearly; erased boxes have the area 0.02 ..
    0.2 and are filled with ImageNet's mean in the already normalised image, as published. "pad" (formulas.md,
    Augmentation of the clustering family): resized bicubically, padded with black by 10 pixels at height 256 in
    proportion, cropped at random; area 0.02 .. 0.4, filled with the mean.
    """

    kind: Literal["ecn", "pad"] = "ecn"
    random_erasing: float = 0.5  # probability

    @property
    def erase_fill(self) -> tuple[float, float, float]:
        """What an erased box is filled with, in the normalised image."""
        return IMAGENET_MEAN if self.kind == "ecn" else (0.0, 0.0, 0.0)


ECN = Augmentation()


def draw_camera(draws: np.ndarray, num_cameras: int) -> np.ndarray:
    """int64 of the draws' shape: uniform over the cameras."""
    return (draws * num_cameras).astype(np.int64)


def _first_fit(draws: Sequence[float], tries: range, area: Range, aspect: Range, size: tuple[int, int]) -> Box | None:
    """The first of the drawn (area, aspect) boxes that fits into `size`, at the drawn place; None where none fits."""
    height, width = size
    for at in tries:
        box_area = (area[0] + draws[at] * (area[1] - area[0])) * height * width
        box_aspect = aspect[0] + draws[at + 1] * (aspect[1] - aspect[0])  # height / width
        box_height = round(math.sqrt(box_area * box_aspect))
        box_width = round(math.sqrt(box_area / box_aspect))
        if box_height <= height and box_width <= width:
            top = int(draws[tries.stop] * (height - box_height + 1))
            left = int(draws[tries.stop + 1] * (width - box_width + 1))
            return top, left, box_height, box_width
    return None


def crop_box(draws: Sequence[float], height: int, width: int) -> Box:
    """The part of a height x width picture that is resized to the input: a random crop, or all if no try fits."""
    tries = range(CROP_TRIES, CROP_TRIES + 2 * MAX_CROP_TRIES, 2)
    return _first_fit(draws, tries, CROP_AREA, CROP_ASPECT, (height, width)) or (0, 0, height, width)


def erase_box(erase_draws: Sequence[float], height: int, width: int, how: Augmentation = ECN) -> Box:
    """The part of the height x width input that is erased; `NO_BOX` if no try fits."""
    tries = range(0, 2 * MAX_ERASE_TRIES, 2)
    area, aspect = ERASE_AREA_ASPECT[how.kind]
    return _first_fit(erase_draws, tries, area, aspect, (height, width)) or NO_BOX


def augment_into(out_HW3: Tensor, pixels: np.ndarray, draws: Sequence[float], how: Augmentation) -> None:
    """Write a (h, w, 3) uint8 picture, cropped, resized and flipped as the sample's NUM_DRAWS `draws` say."""
    flip = draws[FLIP] < FLIP_PROBABILITY
    if how.kind == "ecn":
        resize_into(out_HW3, pixels, crop_box(draws, pixels.shape[0], pixels.shape[1]), flip)
        return
    height, width, _ = out_HW3.shape
    padding = round(PADDING * height)
    top, left = (int(draw * (2 * padding + 1)) for draw in draws[CROP_TRIES : CROP_TRIES + 2])
    padded_HW3 = out_HW3.new_zeros(height + 2 * padding, width + 2 * padding, 3)
    resize_into(padded_HW3[padding : padding + height, padding : padding + width], pixels, flip=flip)
    out_HW3.copy_(padded_HW3[top : top + height, left : left + width])


def resize_into(out_HW3: Tensor, pixels: np.ndarray, box: Box | None = None, flip: bool = False) -> None:
    """Write a (h, w, 3) picture, resized, to `out_HW3`, both uint8: `box` of it bilinearly, or all of it bicubically.

    torch's antialiased uint8 kernels are PIL's with shorter fixed-point weights, so the result is PIL's within two grey
    levels. Flipping comes before resizing, where there are fewer pixels; the two commute.
    """
    pixels_hw3 = torch.from_numpy(pixels)
    if box is not None:
        top, left, height, width = box
        pixels_hw3 = pixels_hw3[top : top + height, left : left + width]
    if flip:
        pixels_hw3 = pixels_hw3.flip(1)
    if box is not None or pixels_hw3.shape != out_HW3.shape:
        # In this order of operations torch sees that the channels come last, and need not rearrange them.
        pixels_13hw, mode = pixels_hw3.unsqueeze(0).permute(0, 3, 1, 2), "bilinear" if box else "bicubic"
        resized_13HW = F.interpolate(pixels_13hw, (out_HW3.shape[0], out_HW3.shape[1]), mode=mode, antialias=True)
        pixels_hw3 = resized_13HW.permute(0, 2, 3, 1)[0]
    out_HW3.copy_(pixels_hw3)


def normalise_and_erase(pixels_bHW3: Tensor, boxes_b4: Tensor | None = None, how: Augmentation = ECN) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32, normalised, with each picture's box (if not empty) filled.

    Only single float operations, each rounded once, so that a pixel does not depend on the batch it came in. An
    accelerator is not waited for.
    """
    mean_3, std_3, fill_3 = _constants(pixels_bHW3.device, how.erase_fill)
    # Reordered while it is bytes: four times less to move than floats.
    images_b3HW = pixels_bHW3.permute(0, 3, 1, 2).contiguous().to(torch.float32).sub_(mean_3).div_(std_3)
    if boxes_b4 is None:
        return images_b3HW
    if pixels_bHW3.device.type != "cpu":
        return torch.where(box_mask(boxes_b4, *images_b3HW.shape[2:]).unsqueeze(1), fill_3, images_b3HW)
    # The boxes are a small part of the pixels, and known here: a mask would take a third as long as normalising.
    for image_3HW, (top, left, height, width) in zip(images_b3HW, boxes_b4.tolist(), strict=True):
        if height:
            image_3HW[:, top : top + height, left : left + width] = fill_3
    return images_b3HW


def box_mask(boxes_b4: Tensor, height: int, width: int) -> Tensor:
    """(b, H, W) bool: the pixels inside of each picture's box."""
    rows_H, columns_W = (torch.arange(size, device=boxes_b4.device) for size in (height, width))
    top_b1, left_b1, height_b1, width_b1 = boxes_b4.T.unsqueeze(2)
    inside_bH = (rows_H >= top_b1) & (rows_H < top_b1 + height_b1)
    inside_bW = (columns_W >= left_b1) & (columns_W < left_b1 + width_b1)
    return inside_bH.unsqueeze(2) & inside_bW.unsqueeze(1)


@cache
def _constants(device: torch.device, fill: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """(3, 1, 1) mean and deviation of bytes, and the fill, made once: to make them waits for the device."""
    mean_3, std_3, fill_3 = (torch.tensor(three).view(3, 1, 1) for three in (IMAGENET_MEAN, IMAGENET_STD, fill))
    return (mean_3 * 255).to(device), (std_3 * 255).to(device), fill_3.to(device)
