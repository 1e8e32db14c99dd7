"""Exact ranking metrics, nearest neighbours, re-ranking, feature extraction."""

from ecn_dist.ranking.features import EvaluationInput, FeatureSet, extract_features, extract_split
from ecn_dist.ranking.neighbors import expand_queries, nearest_pictures
from ecn_dist.ranking.ranking import RankingResult, evaluate_ranking
from ecn_dist.ranking.reranking import KReciprocal, rerank_distances

__all__ = [
    "EvaluationInput",
    "FeatureSet",
    "KReciprocal",
    "RankingResult",
    "evaluate_ranking",
    "expand_queries",
    "extract_features",
    "extract_split",
    "nearest_pictures",
    "rerank_distances",
]
