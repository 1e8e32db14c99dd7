"""Feature extraction by all ranks, each picture once.

Shape letters: n pictures here, G pictures on all ranks, C feature length.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecn_dist.distributed import all_gather_uneven_rows


class LabelledImages(Protocol):
    """What extraction needs of a batch."""

    images: Tensor  # (b, 3, H, W)
    pids: Tensor  # (b,) int64
    camids: Tensor  # (b,) int64


@dataclass(frozen=True)
class FeatureSet:
    """Features of pictures, in the order of the split: (n, C) float, and int64 pids and camids (n,)."""

    features: Tensor
    pids: Tensor
    camids: Tensor

    def gathered(self) -> "FeatureSet":
        """All ranks' pictures on every rank, in rank order. Collective."""
        return FeatureSet(*(all_gather_uneven_rows(part) for part in (self.features, self.pids, self.camids)))


@torch.inference_mode()
def extract_features(
    embed: Callable[[Tensor], Tensor], batches: Iterable[LabelledImages], *, num_features: int, device: torch.device
) -> FeatureSet:
    """Run `embed` ((b, 3, H, W) -> (b, C)) over this rank's `batches`; no collective. A rank may have no batch."""
    features = [torch.empty(0, num_features, device=device)]
    pids = [torch.empty(0, dtype=torch.int64, device=device)]
    camids = [torch.empty(0, dtype=torch.int64, device=device)]
    for batch in batches:
        features.append(embed(batch.images).to(features[0].dtype))
        pids.append(batch.pids)
        camids.append(batch.camids)
    return FeatureSet(torch.cat(features), torch.cat(pids), torch.cat(camids))
