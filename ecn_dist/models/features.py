"""The evaluation feature, and the precision that a network runs in.

Shape letters: b images here, C backbone features.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist.models.backbones import Backbone

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def normalized_features(backbone: Backbone, images: Tensor, by_imagenet: bool = True) -> Tensor:
    """The evaluation feature f_pool / ||f_pool||: (b, 3, H, W) -> (b, C) of unit length, float32 or float64.

    `by_imagenet` is `Backbone.forward`'s.

    Whatever precision the backbone ran in: rounded to bfloat16, lengths would be off by up to 0.2 %. Autocast may be
    on, since it lowers no operation of `normalize`.
    """
    pooled_bC = backbone(images, by_imagenet)
    return F.normalize(pooled_bC if pooled_bC.dtype == torch.float64 else pooled_bC.float(), dim=1)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a network runs in `precision`, in training and outside it."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
