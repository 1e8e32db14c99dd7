"""Evaluation of a network on a target's query and gallery by all ranks."""

from dataclasses import dataclass
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.data import EvaluationStream, ShardIndex, SplitIndex, TrainStream
from ecn_dist.engine.strategy import autocast
from ecn_dist.evaluation import FeatureSet, RankingResult, evaluate_ranking, extract_features
from ecn_dist.models import Backbone, normalized_features, reestimate_batchnorm


@dataclass(frozen=True)
class InputSize:
    """How pictures are read for evaluation."""

    height: int
    width: int
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the features they came from: queries whole, the gallery in rank parts."""

    result: RankingResult
    query: FeatureSet
    gallery_part: FeatureSet

    def summary(self) -> dict[str, Any]:
        """The figures under the names of summary.json, as fractions."""
        return self.result.summary() | {"num_valid_queries": self.result.num_valid_queries}


def has_evaluation(index: ShardIndex) -> bool:
    """Whether a shard folder has query and gallery."""
    return "query" in index.splits and "gallery" in index.splits


def evaluate_backbone(
    backbone: Backbone, index: ShardIndex, size: InputSize, precision: str, device: torch.device
) -> Evaluation:
    """CMC, mAP and mINP on the query and gallery of `index`; every picture is embedded once. Collective."""
    was_training = backbone.training
    backbone.eval()
    query = _extract(backbone, index.split("query"), size, precision, device).gathered()
    gallery = _extract(backbone, index.split("gallery"), size, precision, device)
    backbone.train(was_training)
    result = evaluate_ranking(
        query.features,
        query.pids,
        query.camids,
        gallery.features,
        gallery.pids,
        gallery.camids,
        gallery_sharded=True,
        camera_pairs=True,
    )
    return Evaluation(result, query, gallery)


def _extract(
    backbone: Backbone, split: SplitIndex, size: InputSize, precision: str, device: torch.device
) -> FeatureSet:
    stream = EvaluationStream(
        split,
        height=size.height,
        width=size.width,
        batch_size=size.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=size.workers,
        device=device,
    )
    dtype = next(backbone.parameters()).dtype

    def embed(images: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return normalized_features(backbone, images.to(dtype))

    return extract_features(embed, stream, num_features=backbone.num_features, device=device)


def adapt_batchnorm(backbone: Backbone, stream: TrainStream, precision: str, device: torch.device) -> None:
    """AdaBN: give the backbone BatchNorm statistics of the pictures of `stream`. Collective with `sync` BatchNorm."""
    dtype = next(backbone.parameters()).dtype
    with autocast(precision, device):
        reestimate_batchnorm(backbone, (batch.images.to(dtype) for batch in stream))
