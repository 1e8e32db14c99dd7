"""Evaluation: ranking metrics, re-ranking, feature extraction, pictures."""

from ecn_dist.evaluation.features import FeatureSet, extract_features
from ecn_dist.evaluation.ranking import RankingResult, evaluate_ranking

__all__ = ["FeatureSet", "RankingResult", "evaluate_ranking", "extract_features"]
