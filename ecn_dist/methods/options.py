"""Options that several methods share. Plain dataclasses: importing them imports no torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from ecn_dist.errors import UserError


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes, beside its type: `Annotated[int, Range(least=1)]`; `--help` shows it."""

    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def __repr__(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "below": self.below, "at most": self.most}
        return " and ".join(f"{what} {bound:g}" for what, bound in bounds.items() if math.isfinite(bound)) or "finite"

    def __contains__(self, value: float) -> bool:
        return value > self.above and self.least <= value < self.below and value <= self.most  # NaN never is


Count = Annotated[int, Range(least=1, most=10**9)]
BatchSize = Annotated[int, Range(least=1, most=2**20)]
Natural = Annotated[int, Range(least=0, most=10**9)]
Positive = Annotated[float, Range(above=0, most=1e9)]
NotNegative = Annotated[float, Range(least=0, most=1e9)]
Fraction = Annotated[float, Range(least=0, below=1)]


def check_ranges(options: Any, prefix: str = "") -> None:
    """Raise `UserError` for fields of a dataclass, or items of a list in one, out of `Range`, and texts with a NUL."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        given = getattr(options, name)
        if isinstance(given, str) and "\0" in given:
            raise UserError(f"{prefix}{name}: {given!r} has a NUL character in it; remove it")
        for value in given if isinstance(given, list) else [given]:
            for bounds in _ranges(kind):
                if value is not None and value not in bounds:
                    raise UserError(f"{prefix}{name}: {value} must be {bounds}")


def _ranges(kind: Any) -> Iterable[Range]:
    """Those of a type, and of the types it is made of."""
    return {*getattr(kind, "__metadata__", ()), *(found for part in get_args(kind) for found in _ranges(part))}


def check_streams(options: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise `UserError` unless a method's own batches (sizes by what sets them) can be cut as the global one."""
    streams = options["data.streams"]
    for what, size in sizes.items():
        if size % streams:
            text = f"a batch of {size} pictures must be a multiple of data.streams ({streams})"
            raise UserError(f"{what}: {text}, as global_batch_size is; change one of them")


@dataclass(frozen=True)
class MemoryOptions:
    """the exemplar memory"""

    temperature: Positive = 0.05
    """beta of the softmax over exemplars"""
    momentum: NotNegative = 0.01
    """m of an update is this times the epoch"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the rows; auto: fp32 (fp64 where precision is fp64)"""
    backend: Literal["torch", "triton"] = "torch"
    """of the pass over the rows; triton: kernels for bf16 or fp16 rows on CUDA, D a multiple of 64"""
    start: Literal["zeros", "weights"] = "zeros"
    """the rows at first; weights: those of the published code's checkpoint that model.weights names"""


@dataclass(frozen=True)
class LossOptions:
    """the losses"""

    target_weight: Fraction = 0.3
    """lambda of L = (1 - lambda) L_source + lambda L_target; 0 is the control without target loss"""
    num_neighbors: Natural = 6
    """k of neighbourhood-invariance; 0 turns it off"""
    neighbors_from_epoch: int = 5
    """first epoch with neighbourhood-invariance"""
