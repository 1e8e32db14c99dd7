"""Clusters against their dense definition with scikit-learn."""

import numpy as np
import pytest
import torch

from ecn_dist.clustering import find_clusters, jaccard_similarities
from ecn_dist.errors import UserError
from tests.reference_clusters import dense_clusters, dense_jaccard, random_case

SMALL_BUDGET = 50_000  # products of a few pictures, blocks of a few rows


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("camera_aware", [False, True])
def test_equal_the_dense_definition(camera_aware: bool) -> None:
    some = 0
    for seed in range(50):
        case = random_case(seed)
        options = case.kwargs(camera_aware)
        expected = dense_clusters(case.features, **options)
        result = find_clusters(case.features, **options)
        np.testing.assert_array_equal(result.labels, expected, err_msg=f"case {seed}")
        in_blocks = find_clusters(case.features, **options, memory_budget=SMALL_BUDGET)
        np.testing.assert_array_equal(in_blocks.labels, expected, err_msg=f"case {seed}, in blocks")
        some += int(result.labels.max()) > 0
    assert some > 10


@pytest.mark.parametrize("camera_aware", [False, True])
def test_similarities_equal_the_dense_definition(camera_aware: bool) -> None:
    for seed in range(10):
        case = random_case(seed)
        options = case.kwargs(camera_aware)
        for budget in (SMALL_BUDGET, 2**28):
            found = jaccard_similarities(case.features, **options, memory_budget=budget)
            np.testing.assert_allclose(1 - found.toarray(), dense_jaccard(case.features, **options), atol=1e-12)


@pytest.mark.parametrize("camera_aware", [False, True])
def test_more_neighbours_than_pictures_are_all_of_them(camera_aware: bool) -> None:
    features, camids = unit(40, 4), torch.arange(40) % 3 if camera_aware else None
    wanted = {"k1": 40, "k2": 40, "k1_intra": 40, "k1_inter": 40, "k2_intra": 40, "k2_inter": 40}
    expected = jaccard_similarities(features, camids=camids, **wanted).toarray()
    found = jaccard_similarities(features, camids=camids, **dict.fromkeys(wanted, 10**15))
    np.testing.assert_array_equal(found.toarray(), expected)
    if not camera_aware:
        np.testing.assert_allclose(1 - expected, dense_jaccard(features, k1=40, k2=40), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_taken_as_given(dtype: torch.dtype) -> None:
    features = random_case(4).features.to(dtype)
    result = find_clusters(features, k1=8, k2=3)
    assert result.labels.dtype == torch.int64
    np.testing.assert_array_equal(result.labels, dense_clusters(features, k1=8, k2=3))


def test_distances_closer_than_float32_can_tell() -> None:
    near = unit(1, 8).double().repeat(60, 1)
    near += 1e-4 * torch.randn(60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = torch.nn.functional.normalize(torch.cat([near, unit(60, 8, seed=2).double()]))
    expected = dense_clusters(features, k1=7, k2=2)
    np.testing.assert_array_equal(find_clusters(features, k1=7, k2=2).labels, expected)


def test_graphs_that_do_not_fit_are_made_twice() -> None:
    copies = torch.cat([unit(1, 16).repeat(150, 1), unit(1, 16, seed=1).repeat(90, 1), unit(30, 16, seed=2)])
    expected = dense_clusters(copies, k1=10, k2=6)
    for budget in (SMALL_BUDGET, 2**28):
        result = find_clusters(copies, k1=10, k2=6, memory_budget=budget)
        np.testing.assert_array_equal(result.labels, expected)


def test_one_picture() -> None:
    assert find_clusters(unit(1, 4)).labels.tolist() == [-1]
    assert find_clusters(unit(1, 4), min_samples=1, camids=torch.tensor([3])).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps 0.0 must be above 0 and below 1"),
        ({"eps": 1.0}, "eps 1.0 must be above 0 and below 1"),
        ({"min_samples": 0}, "min_samples 0 must be at least 1"),
        ({"k1": 0}, "k1 0, k2 6: k1 must be at least 1, k2 1 to 0"),
        ({"k2": 31}, "k1 30, k2 31: k1 must be at least 1, k2 1 to 30"),
        ({"k2_intra": 7, "camids": torch.zeros(5, dtype=torch.int64)}, "k1_intra 5, k2_intra 7"),
        ({"k2_inter": 21, "camids": torch.zeros(5, dtype=torch.int64)}, "k1_inter 20, k2_inter 21"),
        ({"camids": torch.zeros(5)}, "camids must be integers, one for each of all 5 pictures"),
        ({"camids": torch.zeros(4, dtype=torch.int64)}, "not int64 of shape \\(4,\\)"),
        ({"features": unit(5, 4).long()}, "features must be floats of shape \\(pictures, length\\), not int64"),
        ({"features": unit(5, 4)[0]}, "not float32 of shape \\(4,\\)"),
        ({"features": unit(5, 4) * 1.1}, "features must be of length 1; that of picture 0 is 1.1. Normalise them"),
        ({"features": unit(5, 4) / 0}, "that of picture 0 is inf. Check the network"),
        ({"features": unit(5, 4)[:0]}, "there are no pictures to cluster"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_clusters(**({"features": unit(5, 4)} | change))


def test_not_finite_is_named() -> None:
    features = unit(5, 4)
    features[3, 1] = torch.nan
    with pytest.raises(UserError, match="that of picture 3 is nan"):
        find_clusters(features)
