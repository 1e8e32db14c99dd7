"""Evaluation of a network on a target's query and gallery by all ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.data import Batch, EvaluationStream, ShardIndex, SplitIndex
from ecn_dist.models import Backbone, autocast, normalized_features, reestimate_batchnorm
from ecn_dist.ranking import (
    FeatureSet,
    KReciprocal,
    RankingResult,
    evaluate_ranking,
    expand_queries,
    extract_features,
)


@dataclass(frozen=True)
class InputSize:
    """How pictures are read for evaluation."""

    height: int
    width: int
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Protocol:
    """How the gallery is ranked."""

    camera_free: bool = False  # no picture is junk; so it always is for data of one camera
    expand_queries: int = 0  # nearest pictures that a query is averaged with
    rerank: bool = False  # by k-reciprocal neighbours, with the paper's settings


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the features they came from: queries whole, the gallery in rank parts."""

    result: RankingResult
    query: FeatureSet
    gallery_part: FeatureSet
    camera_free: bool

    def summary(self) -> dict[str, Any]:
        """The figures under the names of summary.json, as fractions."""
        rates = {f"tpr_at_fpr_{rate:g}": share for rate, share in self.result.true_positive_rates.items()}
        return self.result.summary() | rates | {"num_valid_queries": self.result.num_valid_queries}

    def camera_pairs(self) -> dict[str, Any] | None:
        """The ranking of each camera's gallery for each camera's queries, as fractions; None where none has a match."""
        pairs = self.result.camera_pairs
        if pairs is None:
            return None
        tables = {name: getattr(pairs, name) for name in ("mAP", "rank1", "num_valid_queries")}
        return {"camids": pairs.camids.tolist()} | {
            name: [[None if math.isnan(value) else value for value in row] for row in table.tolist()]
            for name, table in tables.items()
        }


def has_evaluation(index: ShardIndex) -> bool:
    """Whether a shard folder has query and gallery."""
    return "query" in index.splits and "gallery" in index.splits


def evaluate_backbone(
    backbone: Backbone,
    index: ShardIndex,
    size: InputSize,
    precision: str,
    device: torch.device,
    protocol: Protocol = Protocol(),
) -> Evaluation:
    """CMC, mAP and mINP on the query and gallery of `index`; every picture is embedded once. Collective."""
    was_training = backbone.training
    backbone.eval()
    query = _extract(backbone, index.split("query"), size, precision, device).gathered()
    gallery = _extract(backbone, index.split("gallery"), size, precision, device)
    backbone.train(was_training)
    camera_free = protocol.camera_free or index.num_cameras == 1
    query_features = query.features
    if protocol.expand_queries:
        query_features = expand_queries(query_features, gallery.features, protocol.expand_queries, gallery_sharded=True)
    result = evaluate_ranking(
        query_features,
        query.pids,
        None if camera_free else query.camids,
        gallery.features,
        gallery.pids,
        None if camera_free else gallery.camids,
        gallery_sharded=True,
        camera_pairs=not camera_free,
        rerank=KReciprocal() if protocol.rerank else None,
    )
    return Evaluation(result, query, gallery, camera_free)


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


def adapt_batchnorm(backbone: Backbone, stream: Iterable[Batch], precision: str, device: torch.device) -> None:
    """AdaBN: give the backbone BatchNorm statistics of the pictures of `stream`. Collective with `sync` BatchNorm."""
    dtype = next(backbone.parameters()).dtype
    with autocast(precision, device):
        reestimate_batchnorm(backbone, (batch.images.to(dtype) for batch in stream))
