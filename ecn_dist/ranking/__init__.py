"""Exact ranking metrics, nearest neighbours, re-ranking, feature extraction."""

# ruff: noqa: F401 - what is imported here is what others use

from ecn_dist.ranking.features import EvaluationInput, FeatureSet, extract_features, extract_split
from ecn_dist.ranking.neighbors import expand_queries, nearest_pictures
from ecn_dist.ranking.ranking import RankingResult, evaluate_ranking
from ecn_dist.ranking.reranking import KReciprocal
