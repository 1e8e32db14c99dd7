"""Exact ranking metrics, nearest neighbours, re-ranking, feature extraction."""

from ecn_dist.ranking.expansion import expand_queries
from ecn_dist.ranking.features import FeatureSet, extract_features
from ecn_dist.ranking.neighbors import nearest_pictures
from ecn_dist.ranking.ranking import RankingResult, evaluate_ranking
from ecn_dist.ranking.reranking import KReciprocal, rerank_distances

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
