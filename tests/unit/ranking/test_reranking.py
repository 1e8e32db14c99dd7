"""k-reciprocal re-ranking against its dense definition."""

import dataclasses

import numpy as np
import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.ranking import KReciprocal, evaluate_ranking
from ecn_dist.ranking.reranking import RerankedScore
from tests.dense_reranking import dense_reranking
from tests.ranking_cases import Case, assert_same, clustered_case, random_case

CPU = torch.device("cpu")
SMALL_BUDGET = 400_000

SETTINGS = [KReciprocal(), KReciprocal(k1=7, k2=1, distance_weight=0.5), KReciprocal(k1=5, k2=4, distance_weight=0.1)]


def reranked(
    query: torch.Tensor, gallery: torch.Tensor, settings: KReciprocal = SETTINGS[0], budget: int = 2**28
) -> torch.Tensor:
    """The whole table (Q, G) of re-ranked distances."""
    score = RerankedScore(query, gallery, slice(0, len(gallery)), settings, CPU, budget)
    pairs = torch.cartesian_prod(torch.arange(len(query)), torch.arange(len(gallery)))
    return score.of_pairs(*pairs.unbind(1)).view(len(query), len(gallery)).float()


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_dense_definition(settings: KReciprocal) -> None:
    for case in (clustered_case(0, 25, 150, 12), clustered_case(1, 10, 60, 8), random_case(1), random_case(5)):
        for budget in (SMALL_BUDGET, 2**28):
            found = reranked(case.query_features, case.gallery_features, settings, budget)
            expected = dense_reranking(case.query_features, case.gallery_features, settings)
            np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_ranking_is_that_of_the_table(settings: KReciprocal) -> None:
    for case in (clustered_case(2, 40, 200, 12), random_case(3)):
        whole = evaluate_ranking(*case.args, rerank=settings, camera_pairs=True)
        assert whole.true_positive_rates == {}
        # One feature a query and picture whose distance is the table's: the queries one by one.
        table = torch.from_numpy(dense_reranking(case.query_features, case.gallery_features, settings))
        area, first = [], []
        for i, row in enumerate(table):
            one = Case(
                torch.zeros(1, 1, dtype=torch.float64),
                case.query_pids[i : i + 1],
                case.query_camids[i : i + 1],
                row[:, None],
                *case.args[4:],
            )
            try:
                result = evaluate_ranking(*one.args)
            except UserError:  # without a true match
                continue
            area.append(result.mAP)
            first.append(result.cmc[0])
        assert whole.num_valid_queries == len(area)
        assert whole.mAP == pytest.approx(np.mean(area), abs=1e-9)
        assert whole.cmc[0] == pytest.approx(np.mean(first), abs=1e-12)
        in_parts = evaluate_ranking(*case.args, rerank=settings, camera_pairs=True, memory_budget=SMALL_BUDGET)
        assert_same(whole, in_parts, tolerance=1e-12)


def test_many_equal_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    one, others = torch.randn(1, 64, generator=generator), torch.randn(150, 64, generator=generator)
    gallery = torch.nn.functional.normalize(torch.cat([one.repeat(200, 1), others]))
    query = torch.nn.functional.normalize(torch.randn(12, 64, generator=generator) + 0.3 * one)
    found = reranked(query, gallery)
    np.testing.assert_allclose(found, dense_reranking(query, gallery, KReciprocal()), atol=1e-6)
    ids = torch.arange(len(query))
    with pytest.raises(UserError, match="the gallery has no pictures"):
        evaluate_ranking(query, ids, None, gallery[:0], ids[:0], None, rerank=KReciprocal())


def test_helps_where_people_are_clusters() -> None:
    case = clustered_case(3, num_queries=60, num_gallery=500, dim=32)
    before, after = (evaluate_ranking(*case.args, rerank=rerank).mAP for rerank in (None, KReciprocal()))
    assert after > before + 0.02


def test_collapsed_features() -> None:
    case = clustered_case(4, num_queries=5, num_gallery=30, dim=4)
    case.query_features.fill_(0.5)
    case.gallery_features.fill_(0.5)
    assert torch.isfinite(reranked(case.query_features, case.gallery_features)).all()
    assert np.isfinite(evaluate_ranking(*case.args, rerank=KReciprocal()).mAP)


@pytest.mark.parametrize("change", [{"k1": 0}, {"k2": 0}, {"k2": 22}, {"distance_weight": 0.0}])
def test_settings_out_of_range_are_named(change: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(change))} {next(iter(change.values()))}"):
        dataclasses.replace(KReciprocal(), **change)
