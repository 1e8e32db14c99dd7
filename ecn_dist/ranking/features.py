"""Features of a split by all ranks, each picture once.

Shape letters: b pictures of a batch, V views of each (it and its style copies), n pictures here, D feature length.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.data import Batch, EvaluationStream, SplitIndex
from ecn_dist.models import Backbone, autocast, normalized_features

Embed = Callable[[Tensor], Tensor]  # images (b V, 3, H, W) -> features (b V, D)


@dataclass(frozen=True)
class EvaluationInput:
    """How pictures are read for evaluation; `batch_size` and `workers` are a rank's."""

    height: int
    width: int
    batch_size: int
    workers: int


@dataclass(frozen=True)
class FeatureSet:
    """Features of pictures, in the order of the split: (n, D) float, and int64 pids and camids (n,)."""

    features: Tensor
    pids: Tensor
    camids: Tensor

    def gathered(self) -> "FeatureSet":
        """All ranks' pictures on every rank, in rank order. Collective."""
        return FeatureSet(*map(distributed.all_gather_uneven_rows, (self.features, self.pids, self.camids)))


def extract_split(
    network: Backbone | Embed,
    split: SplitIndex,
    size: EvaluationInput,
    *,
    device: torch.device,
    precision: str = "fp32",
    stream: EvaluationStream | None = None,
    **stream_options: Any,
) -> FeatureSet:
    """Features of this rank's contiguous part of `split`; the parts of all ranks, in rank order, are the split.

    Args:
        network: a backbone, whose pooled features in evaluation mode are scaled to length 1 (it returns to its mode
            afterwards), or any function from images to features, called as it is.
        split, size, device: which pictures, how they are read, and where to compute.
        precision: as in the configuration: fp32, bf16, fp16 or fp64.
        stream: of `part_stream`, to be read again; without it, one is made of `stream_options`.
        stream_options: more arguments of `EvaluationStream`. With `style="all"` a picture's feature is the mean over
            it and its copies, scaled to length 1.

    Collective: an exchange of errors at the end of the stream, and of the feature length.
    """
    stream = stream or part_stream(split, size, device=device, **stream_options)
    with autocast(precision, device):
        if not isinstance(network, Backbone):
            return extract_features(network, stream, device=device)
        dtype, was_training = next(network.parameters()).dtype, network.training
        network.eval()
        try:
            embed = lambda images: normalized_features(network, images.to(dtype))  # noqa: E731
            return extract_features(embed, stream, device=device)
        finally:
            network.train(was_training)


def part_stream(split: SplitIndex, size: EvaluationInput, *, device: torch.device, **options: Any) -> EvaluationStream:
    """This rank's contiguous part of `split`; `options` are more arguments of `EvaluationStream`."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return EvaluationStream(split, **asdict(size), rank=rank, world_size=world_size, device=device, **options)


@torch.inference_mode()
def extract_features(embed: Embed, batches: Iterable[Batch], *, device: torch.device) -> FeatureSet:
    """Run `embed` over this rank's `batches`. Features are kept as float64 where they are so, else as float32.

    Several views of a picture, side by side in a batch with one number in its `indices`, give one feature: their mean,
    scaled to length 1. A rank may have no batch. Collective: the length and type of features are agreed on at the end.
    """
    parts = []
    for batch in batches:
        features, num_views = embed(batch.images), int((batch.indices == batch.indices[0]).sum())
        if num_views > 1:
            features = torch.nn.functional.normalize(features.unflatten(0, (-1, num_views)).mean(1), dim=1)
        parts.append((features, batch.pids[::num_views], batch.camids[::num_views]))
    facts = torch.tensor([(part[0].shape[1], part[0].dtype == torch.float64) for part in parts[:1]] or [(0, 0)])
    length, is_double = distributed.all_reduce(facts[0].long(), "max").tolist()
    dtype = torch.float64 if is_double else torch.float32
    no_label = torch.empty(0, dtype=torch.int64, device=device)
    nothing = torch.empty((0, length), dtype=dtype, device=device), no_label, no_label
    features, pids, camids = (torch.cat(column) for column in zip(nothing, *parts, strict=True))
    return FeatureSet(features.to(dtype), pids, camids)
