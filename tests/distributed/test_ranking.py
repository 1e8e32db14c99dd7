"""evaluate_ranking on 2 and 3 ranks, with the gallery whole and in parts: the bits of one process."""

import dataclasses

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.evaluation import RankingResult, evaluate_ranking
from tests.unit.ranking_cases import Case, assert_same, clustered_case, random_case


def cases() -> list[Case]:
    clustered = clustered_case(0, num_queries=60, num_gallery=500, dim=32)
    return [*map(random_case, range(12)), clustered]


def part_of(case: Case, seed: int) -> Case:
    """This rank's part of the gallery: uneven cuts, at times empty."""
    rank, world_size = distributed.rank(), distributed.world_size()
    size = len(case.gallery_pids)
    cuts = [0, *sorted((seed * 7 + 11 * r) % (size + 1) for r in range(1, world_size)), size]
    part = slice(cuts[rank], cuts[rank + 1])
    return Case(*case.args[:3], *(values[part] for values in case.args[3:]))


def check_ranks(expected: list[RankingResult]) -> None:
    for seed, (case, one_rank) in enumerate(zip(cases(), expected, strict=True)):
        assert_same(evaluate_ranking(*case.args, camera_pairs=True), one_rank)
        own = part_of(case, seed)
        assert_same(evaluate_ranking(*own.args, gallery_sharded=True, camera_pairs=True), one_rank)


def check_features_stay(num_gallery: int) -> int:
    case = part_of(clustered_case(1, num_queries=20, num_gallery=num_gallery, dim=512), 1)
    with distributed.count_traffic() as traffic:
        evaluate_ranking(*case.args, gallery_sharded=True)
    return sum(traffic.values())


def check_mistakes_reach_all() -> None:
    case = random_case(0)
    last = distributed.rank() == distributed.world_size() - 1
    wrong = case.gallery_features.clone()
    wrong[2, 0] = torch.nan
    queries = dataclasses.replace(case, query_pids=case.query_pids + 1)
    for change, message in (
        (dataclasses.replace(case, gallery_features=wrong), "gallery features are not finite, first in row 2"),
        (dataclasses.replace(case, gallery_pids=case.gallery_pids[1:]), "gallery pids must be integers"),
        (queries, "every rank must give the same queries"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_ranking(*(change if last else case).args, gallery_sharded=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_one_rank_to_the_bit(ranks, world_size: int) -> None:
    expected = [evaluate_ranking(*case.args, camera_pairs=True) for case in cases()]
    ranks(world_size).run(check_ranks, expected)


def test_no_features_cross_the_network(ranks) -> None:
    for sent in ranks(2).run(check_features_stay, 400):
        assert 0 < sent < 400 * 512 * 4 / 10


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_ranks_mistake_ends_all(ranks, world_size: int) -> None:
    ranks(world_size).run(check_mistakes_reach_all)
