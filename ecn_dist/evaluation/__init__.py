"""Evaluation: ranking metrics, re-ranking, feature extraction, pictures."""

from ecn_dist.evaluation.ranking import RankingResult, evaluate_ranking

__all__ = ["RankingResult", "evaluate_ranking"]
