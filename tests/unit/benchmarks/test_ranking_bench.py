"""The benchmark's problem and its sort-based version."""

import pytest
import torch

from benchmarks.evaluation import Size, bare_product, make_problem, sort_based
from ecn_dist.ranking import evaluate_ranking


def test_sort_based_version_measures_the_same() -> None:
    problem = make_problem(Size(queries=40, gallery=300, people=20, cameras=4), 16, 2.5, torch.device("cpu"))
    assert sort_based(problem) == pytest.approx(evaluate_ranking(*problem.args).mAP_stepwise, abs=1e-6)
    bare_product(problem, 64)
