"""evaluate_ranking on 2 and 3 ranks, with the gallery whole and in parts: the bits of one process."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.data import SplitIndex
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, convert_batchnorm
from ecn_dist.ranking import (
    EvaluationInput,
    FeatureSet,
    KReciprocal,
    RankingResult,
    evaluate_ranking,
    expand_queries,
    extract_split,
    nearest_pictures,
)
from ecn_dist.ranking.evaluating import adapt_batchnorm
from tests.ranking_cases import Case, assert_same, clustered_case, random_case
from tests.tiny_shards import write_split

CPU = torch.device("cpu")

DIRECT = "donot_use_mm_for_euclid_dist"


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


def neighborly_results(case: Case, own: Case, sharded: bool) -> tuple:
    """Everything that rests on nearest pictures."""
    features = case.query_features, own.gallery_features
    nearest = nearest_pictures(*features, 6, gallery_sharded=sharded)
    expanded = expand_queries(*features, 6, gallery_sharded=sharded)
    reranked = evaluate_ranking(*own.args, gallery_sharded=sharded, rerank=KReciprocal(k1=8, k2=3))
    return nearest, expanded, reranked


def check_neighbors(expected: list[tuple]) -> None:
    for seed, (case, one_rank) in enumerate(zip(neighbor_cases(), expected, strict=True)):
        for own, sharded in ((case, False), (part_of(case, seed), True)):
            nearest, expanded, reranked = neighborly_results(case, own, sharded)
            for found, wanted in zip(nearest, one_rank[0], strict=True):
                assert torch.equal(found, wanted)
            distances = torch.cdist(case.query_features.double(), case.gallery_features.double(), compute_mode=DIRECT)
            assert torch.equal(nearest[1], distances.argsort(dim=1, stable=True)[:, : nearest[1].shape[1]])
            torch.testing.assert_close(expanded, one_rank[1], rtol=1e-6, atol=1e-7)
            assert_same(reranked, one_rank[2], tolerance=1e-12)


def neighbor_cases() -> list[Case]:
    alike = clustered_case(3, num_queries=6, num_gallery=240, dim=16)
    alike.gallery_features[:] = alike.gallery_features[:4].repeat(60, 1)  # more equals than a search has spare places
    return [clustered_case(2, num_queries=15, num_gallery=90, dim=16), random_case(3), random_case(5), alike]


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


def one_person() -> Case:
    case = random_case(1, num_queries=4, num_gallery=9)
    pids = [torch.ones_like(values) for values in (case.query_pids, case.gallery_pids)]
    return Case(case.query_features, pids[0], case.query_camids, case.gallery_features, pids[1], case.gallery_camids)


def check_one_person(expected: RankingResult) -> None:
    for own, sharded in ((one_person(), False), (part_of(one_person(), 1), True)):
        assert_same(evaluate_ranking(*own.args, gallery_sharded=sharded, camera_pairs=True), expected)


def size() -> EvaluationInput:
    return EvaluationInput(height=8, width=4, batch_size=3, workers=0)


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    return images.double().mean((2, 3))


def check_extraction(split: SplitIndex, expected: FeatureSet) -> None:
    """Each picture once, by any function, in its own type, also where ranks have no picture."""
    found = extract_split(mean_colours, split, size(), device=CPU).gathered()
    assert found.features.dtype == torch.float64
    torch.testing.assert_close(found.features, expected.features, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.pids, expected.pids)
    assert torch.equal(found.camids, expected.camids)
    half = extract_split(lambda images: mean_colours(images).half(), split, size(), device=CPU)
    assert half.features.dtype == torch.float32


@dataclasses.dataclass
class Batch:
    images: torch.Tensor
    error: str | None = None


def check_adaptation() -> None:
    """A bad batch of one rank ends all, before anyone waits in BatchNorm."""
    backbone = Backbone("small_resnet", 16, 8)
    convert_batchnorm(backbone, "sync", CPU)
    images = torch.rand(2, 3, 16, 8)
    last = distributed.rank() == distributed.world_size() - 1
    adapt_batchnorm(backbone, [Batch(images)] * 2, "fp32", CPU)  # type: ignore[arg-type]
    bad = Batch(images, "picture 3 cannot be decoded" if last else None)
    with pytest.raises(UserError, match="picture 3 cannot be decoded"):
        adapt_batchnorm(backbone, [Batch(images), bad, Batch(images)], "fp32", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_person_alone_is_ranked(ranks, world_size: int) -> None:
    expected = evaluate_ranking(*one_person().args, camera_pairs=True)
    assert set(expected.true_positive_rates.values()) == {1.0}
    ranks(world_size).run(check_one_person, expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_features_of_a_split(ranks, world_size: int, tmp_path: Path) -> None:
    for name, shards in (("many", [4, 3]), ("few", [2])):
        (tmp_path / name).mkdir()
        split = write_split(tmp_path / name, shards)
        expected = extract_split(mean_colours, split, size(), device=CPU)
        assert len(expected.features) == sum(shards)
        ranks(world_size).run(check_extraction, split, expected)


def test_bad_batches_of_batchnorm_adaptation_end_all_ranks(ranks) -> None:
    ranks(2).run(check_adaptation)


@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_one_rank_to_the_bit(ranks, world_size: int) -> None:
    expected = [evaluate_ranking(*case.args, camera_pairs=True) for case in cases()]
    ranks(world_size).run(check_ranks, expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_neighbors_expansion_and_reranking_equal_one_rank(ranks, world_size: int) -> None:
    ranks(world_size).run(check_neighbors, [neighborly_results(case, case, False) for case in neighbor_cases()])


def test_no_features_cross_the_network(ranks) -> None:
    for sent in ranks(2).run(check_features_stay, 400):
        assert 0 < sent < 400 * 512 * 4 / 10


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_ranks_mistake_ends_all(ranks, world_size: int) -> None:
    ranks(world_size).run(check_mistakes_reach_all)
