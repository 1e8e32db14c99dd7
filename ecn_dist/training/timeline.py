"""What changes from epoch to epoch (METHOD.md: Losses, Memory update, Training)."""

import math
from dataclasses import dataclass
from typing import Literal


def memory_momentum(base: float, epoch: int) -> float:
    """m of the memory update in `epoch`: `base` times the epoch, so 0 in epoch 0."""
    return base * epoch


def neighbors_in_epoch(num_neighbors: int, from_epoch: int, epoch: int) -> int:
    """k of neighbourhood-invariance in `epoch`: 0, and so hard weights, before `from_epoch`."""
    return num_neighbors if epoch >= from_epoch else 0


def learning_rate_factor(
    epoch: float, *, schedule: Literal["step", "cosine"], epochs: float, step_epoch: int, warmup_epochs: float
) -> float:
    """What every group's learning rate is multiplied with at the fractional `epoch`, in (0, 1].

    Linear warm-up over `warmup_epochs`; after it `step` is 1, then 0.1 from `step_epoch`, and `cosine` falls to 0 at
    `epochs` (Loshchilov and Hutter 2017, without restarts).
    """
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    if schedule == "step":
        return 0.1 if epoch >= step_epoch else 1.0
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Timeline:
    """Steps and epochs of a run. Steps count from 0; epochs of source-only training come before epoch 0."""

    steps_per_epoch: int
    source_only_epochs: int
    epochs: int

    @property
    def source_only_steps(self) -> int:
        return self.source_only_epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return (self.source_only_epochs + self.epochs) * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to: -source_only_epochs, ..., -1 on the source alone, then 0, 1, ..."""
        return step // self.steps_per_epoch - self.source_only_epochs

    def is_source_only(self, step: int) -> bool:
        return step < self.source_only_steps

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def position_in_phase(self, step: int) -> tuple[float, int]:
        """The fractional epoch of the middle of `step` within its phase, and the phase's epochs.

        The phases are source-only and both losses; the learning rate follows each by itself. The middle of a step
        lies inside its epoch, and strictly between the ends of a warm-up and of a cosine.
        """
        if self.is_source_only(step):
            return (step + 0.5) / self.steps_per_epoch, self.source_only_epochs
        return (step + 0.5 - self.source_only_steps) / self.steps_per_epoch, self.epochs
