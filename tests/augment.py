"""The definition of augmentation, one picture at a time with PIL: what the streams' quick way is held against."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecn_dist.data import transforms
from ecn_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD


def _normalised(picture: Image.Image) -> Tensor:
    pixels_HW3 = torch.from_numpy(np.asarray(picture, dtype=np.float32)) / 255
    return ((pixels_HW3 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(2, 0, 1)


def augment_picture(
    picture: Image.Image,
    draws: Sequence[float],
    erase_draws: Sequence[float],
    height: int,
    width: int,
    random_erasing: float,
) -> Tensor:
    """(3, H, W) float32: crop, resize, flip, normalise, erase, as formulas.md, "Training", says."""
    top, left, crop_height, crop_width = transforms.crop_box(draws, picture.height, picture.width)
    picture = picture.crop((left, top, left + crop_width, top + crop_height))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    if draws[transforms.FLIP] < transforms.FLIP_PROBABILITY:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image_3HW = _normalised(picture)
    if draws[transforms.ERASE] < random_erasing:
        top, left, erase_height, erase_width = transforms.erase_box(erase_draws, height, width)
        fill = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        image_3HW[:, top : top + erase_height, left : left + erase_width] = fill
    return image_3HW


def prepare_picture(picture: Image.Image, height: int, width: int) -> Tensor:
    """One picture for evaluation: resized (bicubic) and normalised; (3, H, W) float32."""
    return _normalised(picture.resize((width, height), Image.Resampling.BICUBIC))
