"""Dropout and stochastic depth whose masks do not depend on the number of ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from ecn_dist.distributed import rank, world_size


class GlobalDropout(nn.Module):
    """Dropout with a mask that is drawn for the global batch from (seed, step), each rank using its own rows.

    So one rank and many ranks drop the same entries. `site` keeps the masks of different layers apart.
    """

    def __init__(self, probability: float, *, seed: int, site: int) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"dropout probability must be in [0, 1), got {probability}")
        self.probability = probability
        self.seed = seed
        self.site = site

    def forward(self, features_bD: Tensor, step: int) -> Tensor:
        """(b, D) -> (b, D), entries zeroed with the probability and the rest scaled up; identity in evaluation mode."""
        if not self.training or self.probability == 0.0:
            return features_bD
        b, dim = features_bD.shape
        generator = torch.Generator(features_bD.device).manual_seed(mix_seed(self.seed, step, self.site))
        # In float32 whatever the features' dtype: the draws, and so the mask, are then the same in every precision.
        uniform_BD = torch.rand(world_size() * b, dim, generator=generator, device=features_bD.device)
        kept_bD = uniform_BD[rank() * b : (rank() + 1) * b] >= self.probability
        return features_bD * (kept_bD.to(features_bD.dtype) / (1.0 - self.probability))


class GlobalDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): each picture goes past a residual branch with some probability.

    The mask is drawn for the global batch from torch's own generator, which the trainer seeds alike on all ranks.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """(b, ...) -> (b, ...), pictures zeroed with the probability and the rest scaled up; in training mode."""
        if not self.training or self.probability == 0.0:
            return branch
        b = branch.shape[0]
        kept_b = torch.rand(world_size() * b, device=branch.device)[rank() * b : (rank() + 1) * b] >= self.probability
        scale_b = kept_b.to(branch.dtype) / (1.0 - self.probability)
        return branch * scale_b.view(b, *[1] * (branch.dim() - 1))


def drop_paths_globally(body: nn.Module) -> None:
    """Put `GlobalDropPath` in the place of timm's and torchvision's modules, whose masks depend on the ranks."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            path: Any = child
            if type(path).__name__ == "DropPath":
                setattr(parent, name, GlobalDropPath(path.drop_prob))
            elif type(path).__name__ == "StochasticDepth" and path.mode == "row":
                setattr(parent, name, GlobalDropPath(path.p))


def mix_seed(*values: int) -> int:
    """A 63-bit seed for torch's generators, in which each of `values` counts (splitmix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    state = 0
    for value in values:
        state = (state + (value & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
