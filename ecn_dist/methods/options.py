"""Options that several methods share. Plain dataclasses: importing them imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from ecn_dist.errors import UserError


def check_range(
    key: str, value: float, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise `UserError` unless `value` is above `above`, at least `least` and below `below`; NaN never is."""
    if value > above and least <= value < below:
        return
    bounds = [
        f"above {above:g}" if above > -math.inf else "",
        f"at least {least:g}" if least > -math.inf else "",
        f"below {below:g}" if below < math.inf else "",
    ]
    raise UserError(f"{key}: {value} must be {' and '.join(filter(None, bounds)) or 'finite'}")


@dataclass(frozen=True)
class MemoryOptions:
    temperature: float = 0.05
    """beta of the softmax over exemplars"""
    momentum: float = 0.01
    """m of an update is this times the epoch"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the rows; auto: fp32 (fp64 where precision is fp64)"""
    backend: Literal["torch", "triton"] = "torch"
    """of the pass over the rows; triton: kernels for bf16 or fp16 rows on CUDA, D a multiple of 64"""
    start: Literal["zeros", "weights"] = "zeros"
    """the rows at first; weights: those of the published code's checkpoint that model.weights names"""

    def check(self, section: str) -> None:
        check_range(f"{section}.temperature", self.temperature, above=0)
        check_range(f"{section}.momentum", self.momentum, least=0)


@dataclass(frozen=True)
class LossOptions:
    target_weight: float = 0.3
    """lambda of L = (1 - lambda) L_source + lambda L_target; 0 is the control without target loss"""
    num_neighbors: int = 6
    """k of neighbourhood-invariance; 0 turns it off"""
    neighbors_from_epoch: int = 5
    """first epoch with neighbourhood-invariance"""

    def check(self, section: str) -> None:
        check_range(f"{section}.target_weight", self.target_weight, least=0, below=1)
        check_range(f"{section}.num_neighbors", self.num_neighbors, least=0)
