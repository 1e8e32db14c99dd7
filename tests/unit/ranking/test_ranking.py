"""evaluate_ranking against scikit-learn and against a sort."""

import dataclasses

import numpy as np
import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.ranking import RankingResult, evaluate_ranking
from tests.ranking_cases import Case, assert_equals_oracle, assert_same, clustered_case, oracle_rate, random_case

DIRECT = "donot_use_mm_for_euclid_dist"
SMALL_BUDGET = 400_000  # bytes: blocks of a few queries, chunks of 16 gallery pictures


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


def test_figures_of_single_queries_and_summary() -> None:
    case = random_case(3)
    case.query_pids[-1] = 99  # nobody in the gallery
    result = evaluate_ranking(*case.args)
    counted = ~np.isnan(result.average_precision)
    assert len(counted) == len(case.query_pids)
    assert not counted[-1]
    assert counted.sum() == result.num_valid_queries
    assert result.average_precision[counted].mean() == pytest.approx(result.mAP)
    np.testing.assert_array_equal(np.isnan(result.first_match_rank), ~counted)
    for k in (1, 5, 10):
        assert (result.first_match_rank[counted] <= k).mean() == pytest.approx(result.cmc[k - 1])
    summary = result.summary()
    figures = {"mAP", "mAP_stepwise", "mINP", "rank1", "rank5", "rank10", "tpr_at_fpr_0.001", "tpr_at_fpr_0.0001"}
    assert set(summary) == figures | {"num_valid_queries", "collapsed_queries"}
    assert summary["rank5"] == result.cmc[4]


def test_many_blocks_and_chunks_of_real_numbers() -> None:
    case = clustered_case(0, num_queries=150, num_gallery=1200, dim=48)
    result = evaluate_ranking(*case.args, camera_pairs=True)
    assert_equals_oracle(result, case)
    assert 0.1 < result.mAP < 0.9
    # The counts are the same; a block's padding changes the order in which float64 terms are added.
    in_parts = evaluate_ranking(*case.args, camera_pairs=True, memory_budget=SMALL_BUDGET)
    assert_same(result, in_parts, tolerance=1e-13)


@pytest.mark.parametrize("change", ["double", "half", "bfloat16", "far", "huge", "tiny", "numpy"])
def test_any_floats(change: str) -> None:
    case = clustered_case(1, num_queries=30, num_gallery=300, dim=20)
    query, gallery = case.query_features, case.gallery_features
    if change in ("double", "half", "bfloat16"):
        query, gallery = (features.to(getattr(torch, change)) for features in (query, gallery))
    elif change == "far":  # distances that the squares of the features would swallow
        query, gallery = query + 1000, gallery + 1000
    elif change in ("huge", "tiny"):
        factor = 1e15 if change == "huge" else 1e-15
        query, gallery = query * factor, gallery * factor
    case = dataclasses.replace(case, query_features=query, gallery_features=gallery)
    args = [values.numpy() for values in case.args] if change == "numpy" else case.args
    assert_equals_oracle(evaluate_ranking(*args), case)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_collapsed_features_are_one_tie(value: float) -> None:
    case = clustered_case(2, num_queries=20, num_gallery=100, dim=7)
    case.query_features.fill_(value)
    case.gallery_features.fill_(value)
    result = evaluate_ranking(*case.args)
    assert_equals_oracle(result, case)
    assert result.collapsed_queries == result.summary()["collapsed_queries"] == result.num_valid_queries > 0


def test_collapsed_queries_are_those_whose_distances_are_all_equal() -> None:
    assert evaluate_ranking(*clustered_case(2, num_queries=20, num_gallery=100, dim=7).args).collapsed_queries == 0
    ids = torch.tensor([1, 1, 2])
    query, gallery = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[-1.0], [1.0], [1.0], [0.0]])
    for pids, camids, expected in (
        ([1, 2, 3, 1], [1, 1, 1, 0], 1),  # query 0: 1 from all but its junk; query 1: 2 and 0; query 2: not all equal
        ([1, 1, 1, 1], [1, 1, 1, 0], 0),  # nobody else to be told apart from
    ):
        args = (query, ids, torch.zeros(3, dtype=torch.int64), gallery, torch.tensor(pids), torch.tensor(camids))
        assert evaluate_ranking(*args).collapsed_queries == expected


def test_first_matches_are_those_of_a_sort() -> None:
    for seed in range(20):
        case = random_case(seed)
        result = evaluate_ranking(*case.args)
        distance = torch.cdist(case.query_features.double(), case.gallery_features.double(), compute_mode=DIRECT)
        same = case.query_pids[:, None] == case.gallery_pids
        true = same & (case.query_camids[:, None] != case.gallery_camids)
        assert result.num_matches.tolist() == true.sum(1).tolist()
        order = distance.masked_fill(~true, torch.inf).argsort(dim=1, stable=True)[:, 0]
        assert result.first_match.tolist() == torch.where(true.any(1), order, -1).tolist()


def test_true_positive_rates_are_those_of_scikit_learn() -> None:
    rates = (0.0, 1e-3, 0.01, 0.1, 0.5, 1.0)
    cases = [*map(random_case, range(40)), clustered_case(4, num_queries=60, num_gallery=500, dim=16)]
    for case in cases:
        found = evaluate_ranking(*case.args, false_positive_rates=rates).true_positive_rates
        assert found == pytest.approx({rate: oracle_rate(case, rate) for rate in rates}, abs=1e-12)


def test_camera_pairs_are_rankings_of_one_camera_for_one_camera() -> None:
    for case in (random_case(12, num_gallery=60), clustered_case(5, num_queries=60, num_gallery=300, dim=16)):
        result = evaluate_ranking(*case.args, camera_pairs=True)
        assert_same(dataclasses.replace(result, camera_pairs=None), evaluate_ranking(*case.args))
        pairs = result.camera_pairs
        assert pairs is not None
        for a, query_camid in enumerate(pairs.camids):
            for b, gallery_camid in enumerate(pairs.camids):
                mine, theirs = case.query_camids == query_camid, case.gallery_camids == gallery_camid
                part = Case(*(x[mine] for x in case.args[:3]), *(x[theirs] for x in case.args[3:]))
                alone: RankingResult | None = None
                if mine.any():
                    try:
                        alone = evaluate_ranking(*part.args)
                    except UserError:  # no query of this camera has a match there
                        alone = None
                assert pairs.num_valid_queries[a, b] == (alone.num_valid_queries if alone else 0)
                assert pairs.mAP[a, b] == pytest.approx(alone.mAP if alone else np.nan, nan_ok=True)
                assert pairs.rank1[a, b] == pytest.approx(alone.cmc[0] if alone else np.nan, nan_ok=True)


def test_no_query_with_a_match_is_an_error() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(UserError, match="true match"):
        evaluate_ranking(torch.zeros(2, 3), ids, ids, torch.zeros(2, 3), ids, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_features": torch.zeros(3)}, "query features must be floats of shape"),
        ({"gallery_features": torch.zeros(6, 4, dtype=torch.int64)}, "gallery features must be floats of shape"),
        ({"gallery_features": torch.zeros(6, 5)}, "query features are 4 long and gallery features 5"),
        ({"gallery_pids": torch.zeros(5, dtype=torch.int64)}, "gallery pids must be integers, one for each of 6"),
        ({"query_camids": torch.zeros(3)}, "query camids must be integers"),
        ({"query_camids": None}, "camids are given for only one"),
        ({"gallery_features": torch.tensor([0.0, 0, 0, 0, torch.nan, 0]).repeat(4, 1).T}, "gallery .* first in row 4"),
        ({"query_features": torch.full((3, 4), torch.inf)}, "query features are not finite, first in row 0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    ids = torch.arange(3)
    case = Case(torch.zeros(3, 4), ids, ids, torch.zeros(6, 4), torch.cat([ids, ids]), torch.arange(6) + 1)
    evaluate_ranking(*case.args)
    with pytest.raises(UserError, match=message):
        evaluate_ranking(*dataclasses.replace(case, **change).args)


def test_order_of_the_gallery_matters_to_equal_distances_alone() -> None:
    case = random_case(8, num_queries=11, num_gallery=59)  # small integers: many are equal
    order = torch.from_numpy(np.random.default_rng(0).permutation(59))
    moved = Case(*case.args[:3], *(values[order] for values in case.args[3:]))
    result, other = evaluate_ranking(*case.args), evaluate_ranking(*moved.args)
    for name in ("mAP", "mAP_stepwise", "true_positive_rates"):
        assert getattr(result, name) == pytest.approx(getattr(other, name), abs=1e-12)
    assert result.mINP != other.mINP
    assert_equals_oracle(other, moved)


@pytest.mark.gpu
def test_accelerator_gives_the_same() -> None:
    device = torch.accelerator.current_accelerator()
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # as a training may have set it
        for case in (random_case(6), random_case(9), clustered_case(6, num_queries=300, num_gallery=3000, dim=256)):
            expected = evaluate_ranking(*case.args, camera_pairs=True)
            there = [values.to(device) for values in case.args]
            assert_close(evaluate_ranking(*there, camera_pairs=True), expected)
            assert_close(evaluate_ranking(*case.args, camera_pairs=True, device=device), expected)
    finally:
        matmul.fp32_precision = before


def assert_close(result: RankingResult, expected: RankingResult) -> None:
    for name in ("mAP", "mAP_stepwise", "mINP", "cmc", "true_positive_rates"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


@pytest.mark.parametrize("dim", [512, 2048])
def test_features_on_one_line_are_ranked_exactly(dim: int) -> None:
    # All entries of a feature are equal, so that the roundings of a dot product repeat instead of cancelling.
    generator = torch.Generator().manual_seed(dim)

    def draw(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.randn(size, 1, generator=generator).sign() * (
            0.1 + 0.01 * torch.rand(size, 1, generator=generator)
        )
        return places.expand(-1, dim).contiguous(), torch.randint(0, 40, (size,), generator=generator)

    case = Case(*draw(40), None, *draw(6000), None)
    assert_equals_oracle(evaluate_ranking(*case.args, false_positive_rates=()), case)
