"""Steps, epochs and learning rates of a run (formulas.md: Training)."""

import math
from dataclasses import dataclass

from ecn_dist.config import OptimConfig
from ecn_dist.methods.base import Step


@dataclass(frozen=True)
class Timeline:
    """Steps count from 0. Epochs on the source alone come first, then the method's epochs 0, 1, ..."""

    steps_per_epoch: int
    source_only_epochs: int
    epochs: int
    source_only_steps_per_epoch: int

    @property
    def source_only_steps(self) -> int:
        return self.source_only_epochs * self.source_only_steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.source_only_steps + self.epochs * self.steps_per_epoch

    def _in_phase(self, number: int) -> tuple[int, int]:
        """Steps since the phase of step `number` began, and those of one of its epochs."""
        if number < self.source_only_steps:
            return number, self.source_only_steps_per_epoch
        return number - self.source_only_steps, self.steps_per_epoch

    def at(self, number: int) -> Step:
        """The place of step `number` in the run."""
        since, steps = self._in_phase(number)
        source_only = number < self.source_only_steps
        return Step(number, since // steps - self.source_only_epochs * source_only, source_only)

    def begins_epoch(self, number: int) -> bool:
        """Whether step `number` is the first of its epoch."""
        since, steps = self._in_phase(number)
        return since % steps == 0

    def ends_epoch(self, number: int) -> bool:
        """Whether step `number` is the last of its epoch."""
        return number + 1 == self.total_steps or self.begins_epoch(number + 1)

    def learning_rate_factor(self, at: Step, optim: OptimConfig) -> float:
        """What every group's learning rate is multiplied with at step `at`, in (0, 1].

        The epochs on the source alone and the method's have a schedule each, over the fractional epoch of the step's
        middle, which lies strictly between the ends of a warm-up and of a cosine. Linear warm-up; after it "step" is 1,
        divided by 10 at each of the method's `step_epoch` that has begun, and "cosine" falls to 0 at the end
        (Loshchilov and Hutter 2017, without restarts).
        """
        since, steps = self._in_phase(at.number)
        epoch, epochs = (since + 0.5) / steps, self.source_only_epochs if at.source_only else self.epochs
        if epoch < optim.warmup_epochs:
            return epoch / optim.warmup_epochs
        if optim.schedule == "step":
            begun = optim.step_epoch if isinstance(optim.step_epoch, list) else [optim.step_epoch]
            return 1.0 if at.source_only else 0.1 ** sum(epoch >= first for first in begun)
        progress = (epoch - optim.warmup_epochs) / max(epochs - optim.warmup_epochs, 1e-12)
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    def in_meta(self) -> dict[str, int]:
        """What a step's number rests on, for a checkpoint's meta data."""
        meta = {"steps_per_epoch": self.steps_per_epoch, "source_only_epochs": self.source_only_epochs}
        if self.source_only_epochs and self.source_only_steps_per_epoch != self.steps_per_epoch:
            meta["source_only_steps_per_epoch"] = self.source_only_steps_per_epoch
        return meta
