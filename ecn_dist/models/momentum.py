"""A momentum encoder: the slowly moving mean of a network (formulas.md; He et al. 2020, Tarvainen and Valpola 2017)."""

import copy
from typing import Any

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    """A copy of `network`, without gradients and always in evaluation mode; its `state_dict` belongs in a checkpoint.

    The copy must be made before the network is wrapped for data parallelism. It is the same on all ranks where the
    network is, running statistics included (so not with `local` BatchNorm).
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
