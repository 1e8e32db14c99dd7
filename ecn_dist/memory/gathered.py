"""The global batch on every rank, and how often its rows repeat."""

import torch
from torch import Tensor

from ecn_dist.distributed import PendingRows
from ecn_dist.memory.row_update import occurrence_number


class GatheredBatch:
    """Features (B, D) and indices (B,) of the global batch, perhaps still on their way."""

    def __init__(self, features: PendingRows, indices: PendingRows) -> None:
        self._features, self._indices = features, indices
        self._occurrence_B: Tensor | None = None
        self._last_occurrence: Tensor | None = None
        self._is_copied: torch.Event | None = None

    @property
    def features_BD(self) -> Tensor:
        return self._features.wait()

    @property
    def indices_B(self) -> Tensor:
        return self._indices.wait()

    def count_repeats(self) -> Tensor:
        """(B,) `occurrence_number` of the indices. The first call also begins to bring its maximum to the host."""
        if self._occurrence_B is None:
            self._occurrence_B = occurrence_number(self.indices_B)
            last = self._occurrence_B.max()
            if last.device.type == "cpu":
                self._last_occurrence = last
            else:
                self._last_occurrence = torch.empty((), dtype=last.dtype, pin_memory=True)
                self._last_occurrence.copy_(last, non_blocking=True)
                self._is_copied = torch.Event(last.device)
                self._is_copied.record()
        return self._occurrence_B

    def rounds(self) -> int:
        """How often the most frequent index occurs.

        On an accelerator the host waits for no more than the copy that the first `count_repeats` began. The loss calls
        it before its pass, so that by the update the device is past it, or still has the pass, the backward pass and
        the optimiser's step in its queue and does not run dry.
        """
        self.count_repeats()
        assert self._last_occurrence is not None
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return int(self._last_occurrence) + 1
