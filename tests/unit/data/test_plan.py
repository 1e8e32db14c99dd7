"""The plan of a pass: the same for all ranks, each sample at most once, well mixed, and never forgetting anyone."""

import numpy as np
import pytest

from ecn_dist.data.plan import PassPlan, check_batch
from ecn_dist.errors import UserError

SHARDS = {1: [100], 3: [50, 7, 43], 40: [1, 2, 3, 4] * 10}
MARKET = 12_936


def rows(plan: PassPlan, pass_number: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    return plan.step(pass_number * plan.steps_per_pass + step, rank, world_size).rows_b


def planned(plan: PassPlan, pass_number: int, world_size: int = 1) -> np.ndarray:
    """(steps, B): the rows of every global batch of a pass, put together from the ranks' parts."""
    return np.stack(
        [
            np.concatenate([rows(plan, pass_number, step, rank, world_size) for rank in range(world_size)])
            for step in range(plan.steps_per_pass)
        ]
    )


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_the_global_batches_do_not_depend_on_the_ranks(shards: int, world_size: int) -> None:
    plan = PassPlan(SHARDS[shards], 24, 12, seed=3, domain="target", window=30)
    for pass_number in (0, 1):
        assert np.array_equal(planned(plan, pass_number), planned(plan, pass_number, world_size))


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("batch", "streams"), [(24, 12), (24, 24), (7, 1), (8, 4), (100, 1), (1, 1)])
@pytest.mark.parametrize("window", [1, 40, 10_000])
def test_a_pass_takes_each_sample_at_most_once_and_leaves_out_less_than_a_batch(
    shards: int, batch: int, streams: int, window: int
) -> None:
    plan = PassPlan(SHARDS[shards], batch, streams, seed=0, domain="source", window=window)
    order = planned(plan, 5).ravel()
    assert len(set(order.tolist())) == len(order)
    assert order.min() >= 0
    assert order.max() < 100
    assert 100 - len(order) < batch


def test_what_a_pass_leaves_out_is_not_always_the_same() -> None:
    plan = PassPlan(SHARDS[3], 24, 12, seed=0, domain="source", window=1)
    left_out = [set(range(100)) - set(planned(plan, pass_number).ravel().tolist()) for pass_number in range(12)]
    assert all(len(left) == 4 for left in left_out)
    assert not set.intersection(*left_out[:2])
    assert len(set.union(*left_out)) > 30


def test_passes_seeds_and_domains_differ() -> None:
    plans = [PassPlan([200], 20, 4, seed, domain) for seed, domain in ((0, "source"), (1, "source"), (0, "target"))]
    orders = [planned(plans[0], 0), planned(plans[0], 1), planned(plans[1], 0), planned(plans[2], 0)]
    for at, one in enumerate(orders):
        for other in orders[at + 1 :]:
            assert (one == other).mean() < 0.05


def test_any_step_can_be_asked_for_first() -> None:
    walked = PassPlan([90, 110], 20, 4, 0, "source", window=30)
    batches = [planned(walked, pass_number) for pass_number in range(3)]
    fresh = PassPlan([90, 110], 20, 4, 0, "source", window=30)
    for pass_number, step in ((2, 7), (0, 3), (1, 9), (2, 0)):
        assert np.array_equal(rows(fresh, pass_number, step), batches[pass_number][step])


@pytest.mark.parametrize("shards", [1, 40])
@pytest.mark.parametrize("streams", [1, 4, 16])
def test_neighbours_in_a_shard_come_as_far_apart_as_in_a_uniform_shuffle(shards: int, streams: int) -> None:
    sizes = np.diff(np.arange(shards + 1) * MARKET // shards)
    plan = PassPlan(sizes, 128, streams, seed=0, domain="target")
    order = planned(plan, 0).ravel()
    position = np.full(MARKET, -1)
    position[order] = np.arange(len(order))
    shard_of = np.repeat(np.arange(shards), sizes)
    neighbours = (position[1:] >= 0) & (position[:-1] >= 0) & (shard_of[1:] == shard_of[:-1])
    distance = np.abs(np.diff(position))[neighbours].mean()
    assert distance >= 0.9 * MARKET / 3


def test_a_window_spans_several_shards_of_a_large_split_but_only_a_few() -> None:
    plan = PassPlan([4000] * 2500, 1200, 12, seed=0, domain="source")
    assert plan.steps_per_pass == 8333
    shards = {int(row) // 4000 for step in range(50) for row in rows(plan, 3, step, rank=1, world_size=12)}
    assert 4 <= len(shards) <= 7


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """A resumed run relies on it. If this must change, checkpoints of older versions must be refused."""
    plan = PassPlan([1, 2, 3] * 10, 4, 2, seed=7, domain="target", window=1)
    assert planned(plan, 1)[:6].tolist() == [
        [26, 2, 48, 36],
        [42, 0, 49, 50],
        [16, 25, 55, 56],
        [15, 43, 11, 41],
        [44, 24, 19, 27],
        [17, 8, 40, 29],
    ]


@pytest.mark.parametrize(
    ("batch", "streams", "world_size", "text"),
    [
        (24, 5, 1, "would do: 1, 2, 3, 4, 6, 8, 12, 24"),
        (24, 4, 3, "would do: 3, 6, 12, 24"),
        (25, 5, 3, "25 does not divide by 3 ranks; 24 would, or use 1, 5, 25 ranks"),
        (24, 0, 1, "at least 1"),
        (240, 12, 1, "source: 100 training pictures are fewer than one batch of 240; lower global_batch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_those_that_do(
    batch: int, streams: int, world_size: int, text: str
) -> None:
    with pytest.raises(UserError, match=text):
        check_batch(PassPlan([100], batch, streams, 0, "source").global_batch_size, streams, world_size)
