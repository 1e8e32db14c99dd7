"""evaluate_ranking on 2 and 3 ranks, with the gallery whole and in parts."""

import pytest

from ecn_dist import distributed
from ecn_dist.evaluation import evaluate_ranking
from tests.unit.ranking_cases import assert_equals_oracle, random_case


def check_ranks(seeds: range) -> None:
    rank, world_size = distributed.rank(), distributed.world_size()
    for seed in seeds:
        case = random_case(seed)
        assert_equals_oracle(evaluate_ranking(*case.args), case)
        cut = [0, *sorted((seed * 7 + 11 * r) % (len(case.gallery_pids) + 1) for r in range(1, world_size))]
        part = slice(cut[rank], [*cut, len(case.gallery_pids)][rank + 1])  # uneven, at times empty
        own = (case.gallery_features[part], case.gallery_pids[part], case.gallery_camids[part])
        assert_equals_oracle(evaluate_ranking(*case.args[:3], *own, gallery_sharded=True), case)


@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_one_rank(ranks, world_size: int) -> None:
    ranks(world_size).run(check_ranks, range(14))
