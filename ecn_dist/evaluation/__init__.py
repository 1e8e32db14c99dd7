"""Evaluation: ranking metrics, re-ranking, feature extraction, pictures."""

from ecn_dist.evaluation.expansion import expand_queries
from ecn_dist.evaluation.features import FeatureSet, extract_features
from ecn_dist.evaluation.neighbors import nearest_pictures
from ecn_dist.evaluation.ranking import RankingResult, evaluate_ranking
from ecn_dist.evaluation.reranking import KReciprocal, rerank_distances

__all__ = [
    "FeatureSet",
    "KReciprocal",
    "RankingResult",
    "evaluate_ranking",
    "expand_queries",
    "extract_features",
    "nearest_pictures",
    "rerank_distances",
]
