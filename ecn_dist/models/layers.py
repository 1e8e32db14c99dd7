"""Layers of ours: pooling, neck, and dropout whose masks do not depend on the number of ranks.

Shape letters: b images here, B on all ranks, C channels, D feature length, h x w positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ecn_dist.distributed import rank, world_size

FLOOR = 1e-6
_PROBABILITIES = {"DropPath": "drop_prob", "StochasticDepth": "p"}  # of timm's and torchvision's modules


class GeM(nn.Module):
    """Generalised-mean pooling (Radenovic et al. 2019): (mean of x^p)^(1/p) over the positions, with one trained p.

    Values are at least 1e-6. In float32 under autocast, and relative to the largest value, so that no power leaves the
    range of the numbers.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, map_bChw: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, C, 1, 1) in its dtype."""
        # The meta device, on which costs are counted, knows no autocast.
        with torch.autocast("cpu" if map_bChw.is_meta else map_bChw.device.type, enabled=False):
            values = map_bChw.to(self.p.dtype).clamp(min=FLOOR)
            largest = values.detach().amax((2, 3), keepdim=True)  # cancels out, in the gradient too
            means = (values / largest).pow(self.p).mean((2, 3), keepdim=True)
            return (largest * means.pow(1 / self.p)).to(map_bChw.dtype)


class Neck(nn.BatchNorm1d):
    """BatchNorm1d on the pooled feature (BNNeck, Luo et al. 2019), (b, C) -> (b, C); its bias is 0 and not trained."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.bias.requires_grad_(False)


class GlobalDropout(nn.Module):
    """Dropout with a mask that is drawn for the global batch from (seed, step), each rank using its own rows.

    So one rank and many ranks drop the same entries. `site` keeps the masks of different layers apart.
    """

    def __init__(self, probability: float, *, seed: int, site: int) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"dropout probability must be in [0, 1), got {probability}")
        self.probability, self.seed, self.site = probability, seed, site

    def forward(self, features_bD: Tensor, step: int) -> Tensor:
        """(b, D) -> (b, D), entries zeroed with the probability and the rest scaled up; identity in evaluation mode."""
        if not self.training or self.probability == 0.0:
            return features_bD
        generator = torch.Generator(features_bD.device).manual_seed(mix_seed(self.seed, step, self.site))
        return features_bD * _scales(features_bD, features_bD.shape[1:], self.probability, generator)


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
        return branch * _scales(branch, [1] * (branch.dim() - 1), self.probability)


def _scales(x: Tensor, shape: Sequence[int], probability: float, generator: torch.Generator | None = None) -> Tensor:
    """(b, *shape): this rank's rows of a global mask, 0 with the probability, else what makes up for it."""
    b = len(x)
    # In float32 whatever the dtype of `x`: the draws, and so the mask, are then the same in every precision.
    uniform = torch.rand(world_size() * b, *shape, generator=generator, device=x.device)
    return (uniform[rank() * b : (rank() + 1) * b] >= probability).to(x.dtype) / (1.0 - probability)


def drop_paths_globally(body: nn.Module) -> None:
    """Put `GlobalDropPath` in the place of timm's and torchvision's modules, whose masks depend on the ranks."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            probability = _PROBABILITIES.get(type(child).__name__)
            if probability and getattr(child, "mode", "row") == "row":
                setattr(parent, name, GlobalDropPath(getattr(child, probability)))


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
