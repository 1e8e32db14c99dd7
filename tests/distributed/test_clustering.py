"""find_clusters on 2 and 3 ranks, with features whole and in parts: the labels of the dense definition."""

import numpy as np
import pytest
import torch

from ecn_dist import distributed
from ecn_dist.clustering import find_clusters, jaccard_similarities
from ecn_dist.errors import UserError
from tests.reference_clusters import dense_clusters, random_case

NUM_CASES = 20  # of the 300 that one rank takes


def part_of(features: torch.Tensor, seed: int) -> torch.Tensor:
    """This rank's part: uneven cuts, at times empty."""
    rank, world_size, size = distributed.rank(), distributed.world_size(), len(features)
    cuts = [0, *sorted((seed * 7 + 11 * r) % (size + 1) for r in range(1, world_size)), size]
    return features[cuts[rank] : cuts[rank + 1]]


def check_ranks(expected: list[np.ndarray], camera_aware: bool) -> None:
    for seed, labels in enumerate(expected):
        case = random_case(seed)
        options = case.kwargs(camera_aware)
        for sharded, budget in ((False, 2**28), (True, 2**28), (True, 50_000)):
            features = part_of(case.features, seed) if sharded else case.features
            result = find_clusters(features, **options, sharded=sharded, memory_budget=budget)
            np.testing.assert_array_equal(result.labels, labels, err_msg=f"case {seed}, sharded {sharded}")


def similarities(seed: int, sharded: bool) -> np.ndarray:
    case = random_case(seed)
    features = part_of(case.features, seed) if sharded else case.features
    return jaccard_similarities(features, **case.kwargs(seed % 2 == 0), sharded=sharded).toarray()


def check_similarities(expected: list[np.ndarray]) -> None:
    for seed, one_rank in enumerate(expected):
        for sharded in (False, True):
            np.testing.assert_array_equal(similarities(seed, sharded), one_rank)


def check_mistakes_reach_all() -> None:
    case = random_case(0)
    last = distributed.rank() == distributed.world_size() - 1
    wrong = part_of(case.features, 3).clone()
    if last:
        wrong[0, 0] = torch.nan
    with pytest.raises(UserError, match="is nan"):
        find_clusters(wrong, sharded=True)
    with pytest.raises(UserError, match="features do not fit together"):
        find_clusters(case.features[int(last) :])
    with pytest.raises(UserError, match="same camids"):
        find_clusters(case.features, camids=case.camids + int(last))


@pytest.mark.parametrize("camera_aware", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_the_dense_definition(ranks, world_size: int, camera_aware: bool) -> None:
    cases = [random_case(seed) for seed in range(NUM_CASES)]
    expected = [dense_clusters(case.features, **case.kwargs(camera_aware)) for case in cases]
    ranks(world_size).run(check_ranks, expected, camera_aware, timeout=280)


@pytest.mark.parametrize("world_size", [2, 3])
def test_similarities_equal_those_of_one_rank_to_the_bit(ranks, world_size: int) -> None:
    ranks(world_size).run(check_similarities, [similarities(seed, False) for seed in range(6)])


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_ranks_mistake_ends_all(ranks, world_size: int) -> None:
    ranks(world_size).run(check_mistakes_reach_all)
