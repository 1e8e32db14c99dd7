"""What is summed up between two lines of metrics.jsonl."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ecn_dist import distributed


@dataclass
class Interval:
    """Sums since the last line; losses stay on the device until they are written."""

    losses: Tensor  # (3,): total, source, target
    steps: int = 0
    steps_here: int = 0  # of them, those since this process started: what the times below belong to
    data_wait: float = 0.0
    replaced: int = 0  # pictures of this rank that could not be decoded
    started: float = field(default_factory=time.monotonic)

    def add(self, losses_3: Tensor, data_wait: float, replaced: int) -> None:
        self.steps += 1
        self.steps_here += 1
        self.losses = self.losses + losses_3
        self.data_wait += data_wait
        self.replaced += replaced

    def mean_losses(self) -> list[float]:
        """Total, source, target: means over the steps and all ranks. Collective."""
        return (distributed.all_reduce(self.losses) / (self.steps * distributed.world_size())).tolist()

    def replaced_on_all_ranks(self) -> int:
        """Pictures replaced because they could not be decoded. Collective."""
        return int(distributed.all_reduce(torch.tensor(self.replaced)))
