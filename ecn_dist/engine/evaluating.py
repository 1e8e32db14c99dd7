"""Evaluation of a network on a target's query and gallery by all ranks."""

from dataclasses import dataclass
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.data import EvaluationStream, ShardIndex, SplitIndex, TrainStream
from ecn_dist.engine.strategy import Strategy
from ecn_dist.evaluation import FeatureSet, RankingResult, evaluate_ranking, extract_features
from ecn_dist.models import reestimate_batchnorm


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
        cmc = self.result.cmc
        return {
            "mAP": float(self.result.mAP),
            "mAP_stepwise": float(self.result.mAP_stepwise),
            "rank1": float(cmc[0]),
            "rank5": float(cmc[4]),
            "rank10": float(cmc[9]),
            "mINP": float(self.result.mINP),
            "num_valid_queries": int(self.result.num_valid_queries),
        }


def has_evaluation(index: ShardIndex) -> bool:
    """Whether a shard folder has query and gallery."""
    return "query" in index.splits and "gallery" in index.splits


def evaluate_network(strategy: Strategy, index: ShardIndex, size: InputSize, device: torch.device) -> Evaluation:
    """CMC, mAP and mINP on the query and gallery of `index`; every picture is embedded once. Collective."""
    network = strategy.network
    was_training = network.training
    network.eval()
    query = _extract(strategy, index.split("query"), size, device).gathered()
    gallery = _extract(strategy, index.split("gallery"), size, device)
    network.train(was_training)
    result = evaluate_ranking(
        query.features, query.pids, query.camids, gallery.features, gallery.pids, gallery.camids, gallery_sharded=True
    )
    return Evaluation(result, query, gallery)


def _extract(strategy: Strategy, split: SplitIndex, size: InputSize, device: torch.device) -> FeatureSet:
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
    dtype = next(strategy.network.parameters()).dtype

    def embed(images: torch.Tensor) -> torch.Tensor:
        with strategy.precision():
            return strategy.network.pooled(images.to(dtype)).float()

    return extract_features(embed, stream, num_features=strategy.network.backbone.num_features, device=device)


def adapt_batchnorm(strategy: Strategy, stream: TrainStream) -> None:
    """AdaBN: give the backbone BatchNorm statistics of the pictures of `stream`. Collective with `sync` BatchNorm."""
    dtype = next(strategy.network.parameters()).dtype
    with strategy.precision():
        reestimate_batchnorm(strategy.network.backbone, (batch.images.to(dtype) for batch in stream))
