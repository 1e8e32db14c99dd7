"""Ranked lists and their numbers with the gallery in parts: the same on every rank as with the whole gallery."""

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking import FeatureSet, evaluate_ranking
from ecn_dist.reporting.pictures import first_answers, ranked_lists, write_run_figures
from tests.picture_cases import random_case


def check_sharded(cuts: list[int]) -> None:
    """`cuts`: the first gallery row of each rank, and the end."""
    own = slice(cuts[distributed.rank()], cuts[distributed.rank() + 1])
    for seed in range(5):
        case = random_case(seed, queries=6, gallery=cuts[-1])
        query, gallery = case[:3], case[3:]
        part = tuple(rows[own] for rows in gallery)
        chosen = [5, 0, 3]
        whole = ranked_lists(*query, *gallery, chosen, top=4)
        lists = ranked_lists(*query, *part, chosen, top=4, gallery_sharded=True)
        assert lists == whole
        assert first_answers(lists, query[1], *part[1:], gallery_sharded=True) == first_answers(
            whole, query[1], *gallery[1:]
        )


def fail_to_read(row: int) -> None:
    raise UserError("picture 3 is cut off")


def check_unreadable_picture(folder: str) -> None:
    case = random_case(0)
    query, gallery = FeatureSet(*case[:3]), FeatureSet(*case[3:])
    result = evaluate_ranking(*case)
    with pytest.raises(UserError, match="picture 3 is cut off"):
        write_run_figures(
            folder, result, query, gallery, read_query=fail_to_read, read_gallery=fail_to_read, gallery_sharded=True
        )
    assert distributed.all_reduce(torch.tensor(1)) == distributed.world_size()  # nobody is left behind


def test_two_ranks(ranks) -> None:
    ranks(2).run(check_sharded, [0, 11, 20])


def test_three_ranks_one_of_them_without_a_picture(ranks, tmp_path) -> None:
    ranks(3).run(check_sharded, [0, 13, 13, 17])
    ranks(3).run(check_unreadable_picture, str(tmp_path))
