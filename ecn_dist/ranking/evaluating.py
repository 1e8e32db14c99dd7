"""Evaluation of a network on a target's query and gallery by all ranks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.data import Batch, ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, autocast, reestimate_batchnorm
from ecn_dist.ranking.features import EvaluationInput, FeatureSet, extract_split
from ecn_dist.ranking.neighbors import expand_queries
from ecn_dist.ranking.ranking import RankingResult, evaluate_ranking
from ecn_dist.ranking.reranking import KReciprocal


@dataclass(frozen=True)
class RankingOptions:
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
    size: EvaluationInput,
    precision: str,
    device: torch.device,
    options: RankingOptions = RankingOptions(),
) -> Evaluation:
    """CMC, mAP and mINP on the query and gallery of `index`; every picture is embedded once. Collective."""
    splits = (index.split(name) for name in ("query", "gallery"))
    part, gallery = (extract_split(backbone, of, size, device=device, precision=precision) for of in splits)
    query, camera_free = part.gathered(), options.camera_free or index.num_cameras == 1
    query_features = query.features
    if options.expand_queries:
        query_features = expand_queries(query_features, gallery.features, options.expand_queries, gallery_sharded=True)
    result = evaluate_ranking(
        query_features,
        query.pids,
        None if camera_free else query.camids,
        gallery.features,
        gallery.pids,
        None if camera_free else gallery.camids,
        gallery_sharded=True,
        camera_pairs=not camera_free,
        rerank=KReciprocal() if options.rerank else None,
    )
    return Evaluation(result, query, gallery, camera_free)


def adapt_batchnorm(backbone: Backbone, stream: Iterable[Batch], precision: str, device: torch.device) -> None:
    """AdaBN: give the backbone BatchNorm statistics of the pictures of `stream`, as long on every rank. Collective.

    Raises `UserError` on every rank where one has a batch that cannot be read.
    """
    dtype, batches = next(backbone.parameters()).dtype, iter(stream)

    def next_images() -> torch.Tensor | None:
        batch = next(batches, None)
        if batch is not None and batch.error:
            raise UserError(batch.error)
        return None if batch is None else batch.images.to(dtype)

    def images() -> Iterator[torch.Tensor]:
        while (found := distributed.together(next_images)) is not None:
            yield found

    with autocast(precision, device):
        reestimate_batchnorm(backbone, images())
