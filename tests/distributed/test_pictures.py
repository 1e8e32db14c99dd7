"""Ranked lists and their numbers with the gallery in parts: the same on every rank as with the whole gallery."""

from pathlib import Path

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.data.index import ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.reporting.figures import write_figures
from ecn_dist.reporting.ranked import Answers, RankedList
from tests.picture_cases import evaluation_of, random_case
from tests.report_cases import shards_of


def case_of(seed: int, size: int) -> tuple[torch.Tensor, ...]:
    return random_case(seed, queries=6, gallery=size)


def answers_of(answers: Answers) -> tuple[list[RankedList], dict]:
    return answers.lists([5, 0, 3], 4), answers.first([5, 0, 3, 1])


def check_sharded(cuts: list[int], expected: list) -> None:
    """`cuts`: the first gallery row of each rank, and the end."""
    own = slice(cuts[distributed.rank()], cuts[distributed.rank() + 1])
    for seed, one_rank in enumerate(expected):
        evaluation = evaluation_of(case_of(seed, cuts[-1]), part=own)
        assert repr(answers_of(Answers(evaluation))) == repr(one_rank)  # as text, since NaN is not NaN


def compare(ranks, cuts: list[int]) -> None:
    expected = [answers_of(Answers(evaluation_of(case_of(seed, cuts[-1])))) for seed in range(5)]
    ranks(len(cuts) - 1).run(check_sharded, cuts, expected)


def check_unreadable_picture(folder: str) -> None:
    evaluation = evaluation_of(random_case(0), part=slice(0, 40 if distributed.is_main() else 0))
    with pytest.raises(UserError, match=r"query-000000\.tar"):
        write_figures(Path(folder), evaluation, {"target": ShardIndex.load(f"{folder}/packed")})
    assert distributed.all_reduce(torch.tensor(1)) == distributed.world_size()  # nobody is left behind


def test_two_ranks(ranks) -> None:
    compare(ranks, [0, 11, 20])


def test_three_ranks_one_of_them_without_a_picture(ranks, tmp_path) -> None:
    compare(ranks, [0, 13, 13, 17])
    shard = Path(shards_of(tmp_path, queries=7).folder) / "query-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    ranks(3).run(check_unreadable_picture, str(tmp_path))
