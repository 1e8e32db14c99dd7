"""Which queries are chosen and what the gallery answers, against plain sorting."""

import numpy as np
import pytest
import torch

from ecn_dist.reporting.ranked import Answers, RankedList, choose_queries
from tests.picture_cases import evaluation_of, random_case


def plain_ranking(case: tuple[torch.Tensor, ...], query: int, with_cameras: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows in order of distance, then of row, without junk; which are right."""
    features, pids, camids, gallery, gallery_pids, gallery_camids = (part.double().numpy() for part in case)
    distance = np.sqrt(((gallery - features[query]) ** 2).sum(1))
    right = gallery_pids == pids[query]
    kept = ~(right & (gallery_camids == camids[query])) if with_cameras else np.ones_like(right)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(distance[rows], kind="stable")]
    return rows, right[rows]


def lists_of(case: tuple[torch.Tensor, ...], with_cameras: bool, top: int) -> list[RankedList]:
    answers = Answers(evaluation_of(case, camera_free=not with_cameras))
    return answers.lists(list(range(len(case[1]))), top)


@pytest.mark.parametrize("with_cameras", [True, False])
@pytest.mark.parametrize("top", [1, 10, 100])
def test_lists_are_those_of_a_stable_sort(with_cameras: bool, top: int) -> None:
    for seed in range(10):
        case = random_case(seed)
        lists = lists_of(case, with_cameras, top)
        assert [ranked.query for ranked in lists] == list(range(len(case[1])))
        for ranked in lists:
            rows, right = plain_ranking(case, ranked.query, with_cameras)
            assert [match.row for match in ranked.matches] == rows[:top].tolist()
            assert [match.rank for match in ranked.matches] == list(range(1, len(rows[:top]) + 1))
            assert [match.right for match in ranked.matches] == right[:top].tolist()
            assert ranked.num_right == right.sum()
            assert np.isnan(ranked.average_precision) == (not right.any())
            assert ranked.camid == (int(case[2][ranked.query]) if with_cameras else None)
            for match in ranked.matches:
                assert match.camid == (int(case[5][match.row]) if with_cameras else None)
            if not right.any():
                assert ranked.first_right is None
                continue
            assert ranked.first_right is not None
            first = int(np.flatnonzero(right)[0])
            assert (ranked.first_right.row, ranked.first_right.rank) == (rows[first], first + 1)


def test_first_answers_are_counted() -> None:
    case = random_case(3, queries=30)
    _, query_pids, query_camids, _, _, gallery_camids = case
    wrong, own, shares, counted = 0, 0, [], 0
    for query in range(len(query_pids)):
        rows, right = plain_ranking(case, query, True)
        if not right.any():
            continue
        counted += 1
        same = (gallery_camids[rows] == query_camids[query]).numpy()
        shares.append(same.mean())
        wrong += not right[0]
        own += bool(same[0]) and not right[0]
    everyone = list(range(len(query_pids)))
    found = Answers(evaluation_of(case)).first(everyone)
    assert (found["num_queries"], found["num_wrong"], found["num_wrong_own_camera"]) == (counted, wrong, own)
    assert found["own_camera_share"] == pytest.approx(np.mean(shares))
    assert 0 < own < wrong < counted  # the case tests something
    assert "num_wrong_own_camera" not in Answers(evaluation_of(case, camera_free=True)).first(everyone)


def test_queries_are_chosen_by_precision_one_a_person() -> None:
    precision = np.array([0.9, 0.1, np.nan, 0.5, 1.0, 0.2, 0.95])
    pids = np.array([1, 2, 3, 4, 1, 2, 5])
    assert choose_queries(precision, pids, 3, "best") == [4, 6, 3]  # query 0 shows the person of query 4 again
    assert choose_queries(precision, pids, 3, "worst") == [1, 3, 0]
    assert choose_queries(precision, pids, 99, "worst") == [1, 3, 0, 6, 5, 4]  # then persons come again; 2 never
    anyone = choose_queries(precision, pids, 4, "random", seed=1)
    assert anyone == choose_queries(precision, pids, 4, "random", seed=1)
    assert len({pids[query] for query in anyone}) == 4
    assert 2 not in anyone
    assert len({tuple(choose_queries(precision, pids, 4, "random", seed=seed)) for seed in range(20)}) > 5


def test_equal_precisions_fall_to_the_seed() -> None:
    ties = {tuple(choose_queries(np.ones(50), np.arange(50), 3, "best", seed=seed)) for seed in range(10)}
    assert len(ties) > 5
