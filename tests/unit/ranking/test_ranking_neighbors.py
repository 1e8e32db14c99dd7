"""Nearest pictures and query expansion against a sort in float64."""

import numpy as np
import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.ranking import evaluate_ranking, expand_queries, nearest_pictures, neighbors
from tests.ranking_cases import clustered_case, random_case

SMALL_BUDGET = 400_000


def sorted_neighbors(query: torch.Tensor, gallery: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(((query.double().numpy()[:, None] - gallery.double().numpy()[None]) ** 2).sum(2))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


@pytest.mark.parametrize("k", [1, 7, 10**20])
@pytest.mark.parametrize("budget", [SMALL_BUDGET, 2**28])
def test_nearest_pictures_are_those_of_a_sort(k: int, budget: int) -> None:
    cases = [random_case(seed) for seed in (1, 3, 5, 7)]
    cases += [random_case(2, num_queries=8, num_gallery=12), clustered_case(0, 70, 600, 24)]
    for case in cases:
        query, gallery = case.query_features, case.gallery_features
        distances, pictures = nearest_pictures(query, gallery, k, memory_budget=budget)
        expected_distances, expected = sorted_neighbors(query, gallery, k)
        np.testing.assert_array_equal(pictures, expected)
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-13)


def test_a_product_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "BATCH", 2000)
    case = clustered_case(0, 70, 600, 24)
    _, pictures = nearest_pictures(case.query_features, case.gallery_features, 7)
    np.testing.assert_array_equal(pictures, sorted_neighbors(case.query_features, case.gallery_features, 7)[1])


def test_expanded_queries_are_means() -> None:
    case = clustered_case(1, num_queries=40, num_gallery=300, dim=16)
    query, gallery = case.query_features.double(), case.gallery_features.double()
    _, order = sorted_neighbors(query, gallery, 4)
    expected = torch.stack([torch.cat([query[i : i + 1], gallery[order[i]]]).mean(0) for i in range(len(query))])
    expected = expected / expected.norm(dim=1, keepdim=True)
    expanded = expand_queries(*case.args[::3], 4)
    assert expanded.dtype == torch.float32
    torch.testing.assert_close(expanded, expected.float(), rtol=1e-6, atol=1e-7)


def test_expansion_helps_where_neighbours_are_right() -> None:
    case = clustered_case(2, num_queries=80, num_gallery=600, dim=32)
    before = evaluate_ranking(*case.args).mAP
    expanded = expand_queries(case.query_features, case.gallery_features, 3)
    assert evaluate_ranking(expanded, *case.args[1:]).mAP > before + 0.01


def test_mistakes_are_named() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(UserError, match="at least 1 is needed"):
        expand_queries(x, x, 0)
    with pytest.raises(UserError, match="4 long and gallery features 5"):
        nearest_pictures(x, torch.zeros(3, 5), 2)
    with pytest.raises(UserError, match="there are no queries"):
        nearest_pictures(x[:0], x, 2)
    with pytest.raises(UserError, match="the gallery has no pictures"):
        nearest_pictures(x, x[:0], 2)
    for k in (0, -1):
        with pytest.raises(UserError, match=f"the {k} nearest pictures"):
            nearest_pictures(x, x, k)


def many_alike() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and galleries with more pictures about as far as the k-th nearest than a search has spare candidates."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(20, 64, generator=generator))
    query = torch.nn.functional.normalize(base[:6] + 0.05 * torch.randn(6, 64, generator=generator))
    copies = base.repeat_interleave(40, 0)
    shaken = copies.double() + 1e-9 * torch.randn(copies.shape, generator=generator, dtype=torch.float64)
    mixed = copies[torch.randperm(len(copies), generator=generator)]
    return [(query, base[:1].repeat(200, 1)), (query, copies), (query, mixed), (query.double(), shaken)]


@pytest.mark.parametrize("budget", [SMALL_BUDGET, 2**28])
def test_pictures_alike_are_told_apart_and_equals_stay_in_order(budget: int) -> None:
    for query, gallery in many_alike():
        for k in (1, 5, 50):
            distances, pictures = nearest_pictures(query, gallery, k, memory_budget=budget)
            expected_distances, expected = sorted_neighbors(query, gallery, k)
            np.testing.assert_array_equal(pictures, expected)
            np.testing.assert_allclose(distances, expected_distances, rtol=1e-13)
