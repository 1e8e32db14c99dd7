"""Methods as the trainer builds them, but from a few numbers: for tests that need a network with heads."""

from typing import Any

import torch
from torch import Tensor

from ecn_dist.data import Batch
from ecn_dist.methods.base import Setting, TargetPictures
from ecn_dist.methods.ecn.method import ECN
from ecn_dist.methods.source_only import SourceOnly
from ecn_dist.models import Backbone


def setting(
    arch: str = "small_resnet", *, height: int = 64, width: int = 32, num_exemplars: int = 0, **others: Any
) -> Setting:
    """A `Setting` with a new backbone; `others` are its other fields."""
    target = None
    if num_exemplars:
        target = TargetPictures(num_exemplars, 1, torch.zeros(num_exemplars, dtype=torch.int64), None)
    small = {"num_identities": 7, "embedding_dim": 16, "global_batch_size": 12, "epochs": 1}
    return Setting(backbone=Backbone(arch, height, width), target=target, **(small | others))


def source_network(arch: str = "small_resnet", **others: Any) -> SourceOnly:
    """Backbone, embedding and source head, in the order in which a run draws their weights."""
    return SourceOnly(setting(arch, **others))


def ecn_network(arch: str = "small_resnet", *, num_exemplars: int = 24, **others: Any) -> ECN:
    return ECN(setting(arch, num_exemplars=num_exemplars, **others))


def batch(labels: Tensor | None = None, indices: Tensor | None = None) -> Batch:
    """What losses read of a batch, whose pictures have passed through the network."""
    given = next(values for values in (labels, indices) if values is not None)
    unknown = torch.full_like(given, -1)
    labels, indices = (unknown if values is None else values for values in (labels, indices))
    return Batch(torch.empty(len(given), 0), labels, unknown, unknown, indices)
