"""Schedules of METHOD.md."""

import math

import pytest

from ecn_dist.training.timeline import Timeline, learning_rate_factor, memory_momentum, neighbors_in_epoch


def test_memory_momentum_rises_with_the_epoch() -> None:
    assert [memory_momentum(0.01, epoch) for epoch in (0, 1, 59)] == [0.0, 0.01, 0.59]


def test_neighbors_begin_at_their_epoch() -> None:
    assert [neighbors_in_epoch(6, 5, epoch) for epoch in (0, 4, 5, 59)] == [0, 0, 6, 6]


def factor(epoch: float, schedule: str, warmup: float = 0.0) -> float:
    return learning_rate_factor(epoch, schedule=schedule, epochs=60, step_epoch=40, warmup_epochs=warmup)


def test_step_schedule_divides_by_ten_at_its_epoch() -> None:
    assert [factor(e, "step") for e in (0, 39.99, 40, 59)] == [1, 1, 0.1, 0.1]


def test_cosine_falls_to_zero() -> None:
    assert factor(0, "cosine") == 1
    assert factor(30, "cosine") == pytest.approx(0.5)
    assert factor(60, "cosine") == pytest.approx(0, abs=1e-12)


def test_warm_up_is_linear_and_meets_the_schedule() -> None:
    assert [factor(e, "step", 2.0) for e in (0.5, 1, 2)] == [0.25, 0.5, 1.0]
    assert factor(31, "cosine", 2.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 29 / 58)))


def test_timeline_counts_source_only_epochs_apart() -> None:
    timeline = Timeline(steps_per_epoch=10, source_only_epochs=2, epochs=3)
    assert timeline.total_steps == 50
    assert [timeline.epoch(step) for step in (0, 9, 10, 19, 20, 49)] == [-2, -2, -1, -1, 0, 2]
    assert [timeline.is_source_only(step) for step in (19, 20)] == [True, False]
    assert [timeline.ends_epoch(step) for step in (8, 9, 19)] == [False, True, True]
    assert timeline.position_in_phase(19) == (pytest.approx(1.95), 2)
    assert timeline.position_in_phase(20) == (pytest.approx(0.05), 3)
