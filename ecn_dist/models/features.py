"""Networks in use: the evaluation feature, the precision, a name for the weights, and the slowly moving mean of them.

Shape letters: b images here, C backbone features.
"""

import copy
import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist.models.backbones import BATCH_COUNT, Backbone

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def normalized_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """The evaluation feature f_pool / ||f_pool||: (b, 3, H, W) -> (b, C) of unit length, float32 or float64.

    Whatever precision the backbone ran in: rounded to bfloat16, lengths would be off by up to 0.2 %. Autocast may be
    on, since it lowers no operation of `normalize`.
    """
    pooled_bC = backbone(images)
    return F.normalize(pooled_bC if pooled_bC.dtype == torch.float64 else pooled_bC.float(), dim=1)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a network runs in `precision`, in training and outside it."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def fingerprint_backbone(backbone: Backbone, height: int, width: int) -> str:
    """Which model is this? Features of different models must not be compared.

    SHA-256 of the network's name and options, the size of its input and all its weights, rounded to float32: the same
    for a run, its export and a checkpoint of the same step, on any device.
    """
    stride = "" if backbone.last_stride == 2 else f" last stride {backbone.last_stride}"  # no weight tells of it
    own = "" if backbone.from_imagenet is None else f" mean {backbone.mean} std {backbone.std}"
    digest = hashlib.sha256(f"{backbone.arch} {height}x{width}{stride}{own}".encode())
    for name, tensor in sorted(backbone.body.state_dict().items()):
        if not name.endswith(BATCH_COUNT):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(values.numpy().data)
    return digest.hexdigest()


class MomentumEncoder(nn.Module):
    """A copy of `network` that follows it as a moving mean (formulas.md; He et al. 2020, Tarvainen and Valpola 2017).

    Without gradients and always in evaluation mode; its `state_dict` belongs in a checkpoint. The copy must be made
    before the network is wrapped for data parallelism. It is the same on all ranks where the network is, running
    statistics included (so not with `local` BatchNorm).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MomentumEncoder":
        """Stays in evaluation mode, whatever `mode`."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, network: nn.Module, a: float) -> None:
        """theta_e <- a theta_e + (1 - a) theta, for parameters and running statistics; counters are copied.

        `network` is the one that was copied, or has its names. To be called after each optimiser step that was taken.
        """
        state = network.state_dict()
        for name, mean in self.network.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(state[name], 1 - a)
            else:
                mean.copy_(state[name])
