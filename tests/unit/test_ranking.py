"""evaluate_ranking against scikit-learn and against a sort."""

import dataclasses

import numpy as np
import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.evaluation import evaluate_ranking
from tests.unit.ranking_cases import Case, assert_equals_oracle, random_case


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_equals_scikit_learn_and_a_sort(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        case = random_case(seed)
        assert_equals_oracle(evaluate_ranking(*case.args), case)


def test_without_cameras_nothing_is_junk() -> None:
    for seed in range(10):
        case = dataclasses.replace(random_case(seed), query_camids=None, gallery_camids=None)
        assert_equals_oracle(evaluate_ranking(*case.args), case)


def test_worked_example() -> None:
    # Distances from the query at 0: true 1, false 2, true 3 and false 3 (true first in the gallery); junk at 0.
    gallery = torch.tensor([[0.0], [3.0], [2.0], [3.0], [1.0]])
    pids, camids = torch.tensor([1, 1, 2, 3, 1]), torch.tensor([0, 1, 1, 1, 2])
    result = evaluate_ranking(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([0]), gallery, pids, camids)
    # Precision-recall points: (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/4).
    assert result.mAP == pytest.approx(0.5 * 1 + 0.5 * (1 / 2 + 2 / 4) / 2)
    assert result.mAP_stepwise == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert result.mINP == pytest.approx(2 / 3)
    assert result.cmc[0] == 1
    assert len(result.cmc) >= 50


def test_no_query_with_a_match_is_an_error() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(UserError, match="true match"):
        evaluate_ranking(torch.zeros(2, 3), ids, ids, torch.zeros(2, 3), ids, ids)


def test_order_of_the_gallery_matters_to_equal_distances_alone() -> None:
    case = random_case(7, num_queries=9, num_gallery=50)
    order = torch.from_numpy(np.random.default_rng(0).permutation(50))
    moved = Case(*case.args[:3], case.gallery_features[order], case.gallery_pids[order], case.gallery_camids[order])
    result, other = evaluate_ranking(*case.args), evaluate_ranking(*moved.args)
    assert result.mAP == pytest.approx(other.mAP, abs=1e-12)
    assert result.mAP_stepwise == pytest.approx(other.mAP_stepwise, abs=1e-12)
