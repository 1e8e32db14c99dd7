"""Nearest pictures against a sort of all distances, and exact products."""

import pytest
import torch

from ecn_dist.clustering.neighbors import Ranking, nearest
from ecn_dist.clustering.pictures import Pictures, exact_products
from tests.reference_clusters import random_case, squared_distances


@pytest.mark.parametrize("among", ["all", "same", "others"])
@pytest.mark.parametrize("budget", [50_000, 2**28])
def test_nearest_are_those_of_a_sort(among: str, budget: int) -> None:
    for seed in range(20):
        case = random_case(seed)
        distances, cameras = squared_distances(case.features), case.camids.numpy()
        pictures = Pictures(case.features, False, budget)
        ((distances_nk, numbers_nk),) = nearest(pictures, [Ranking(7, among=among)], case.camids)
        for i, (numbers, values) in enumerate(zip(numbers_nk, distances_nk, strict=True)):
            there = [
                j for j in range(len(cameras)) if among == "all" or (cameras[j] == cameras[i]) == (among == "same")
            ]
            expected = sorted(there, key=lambda j: (j != i, distances[i, j], j))[:7]
            assert numbers[numbers >= 0].tolist() == expected
            assert values[: len(expected)].tolist() == pytest.approx(distances[i, expected], abs=1e-14)


def test_all_distances_of_many_copies() -> None:
    features = torch.nn.functional.normalize(
        torch.ones(700, 12) + torch.arange(2).repeat(350)[:, None] * torch.eye(12)[0]
    )
    ((_, numbers_nk),) = nearest(Pictures(features, False, 50_000), [Ranking(5)], None)
    for i in (0, 1, 2, 399, 698, 699):
        others = [j for j in range(i % 2, 20, 2) if j != i]
        assert numbers_nk[i].tolist() == [i, *others[:4]]


def test_exact_products_do_not_depend_on_the_order_of_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.nn.functional.normalize(torch.randn(40, 1000, generator=generator)) for _ in range(2))
    found, order = exact_products(left, right), torch.randperm(1000, generator=generator)
    assert torch.equal(found, exact_products(left[:, order], right[:, order]))
    torch.testing.assert_close(found, left.double() @ right.double().T, rtol=0, atol=1e-15)
    assert torch.equal(found[3:4, 5:6], exact_products(left[3:4], right[5:6]))


def test_chunks_keep_to_the_budget() -> None:
    features = torch.eye(1, 2048)
    assert Pictures(features, False, 2**28).chunk_size * (4 * 2048 + 4 * 2048) < 2**28
    assert Pictures(features, False, 1).chunk_size == 16
