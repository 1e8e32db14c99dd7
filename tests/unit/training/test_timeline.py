"""Schedules of formulas.md."""

import math

import pytest

from ecn_dist.training.timeline import Timeline, learning_rate_factor


def factor(epoch: float, schedule: str, warmup: float = 0.0, steps: tuple[int, ...] = (40,)) -> float:
    return learning_rate_factor(epoch, schedule=schedule, epochs=60, step_epochs=steps, warmup_epochs=warmup)


def test_step_schedule_divides_by_ten_at_its_epoch() -> None:
    assert [factor(e, "step") for e in (0, 39.99, 40, 59)] == [1, 1, 0.1, 0.1]
    assert [factor(e, "step", steps=(20, 40)) for e in (19, 20, 40)] == pytest.approx([1, 0.1, 0.01])


def test_cosine_falls_to_zero() -> None:
    assert factor(0, "cosine") == 1
    assert factor(30, "cosine") == pytest.approx(0.5)
    assert factor(60, "cosine") == pytest.approx(0, abs=1e-12)


def test_warm_up_is_linear_and_meets_the_schedule() -> None:
    assert [factor(e, "step", 2.0) for e in (0.5, 1, 2)] == [0.25, 0.5, 1.0]
    assert factor(31, "cosine", 2.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 29 / 58)))


def test_timeline_counts_source_only_epochs_apart() -> None:
    timeline = Timeline(steps_per_epoch=10, source_only_epochs=2, epochs=3, source_only_steps_per_epoch=10)
    assert timeline.total_steps == 50
    assert [timeline.at(step).epoch for step in (0, 9, 10, 19, 20, 49)] == [-2, -2, -1, -1, 0, 2]
    assert [timeline.at(step).source_only for step in (19, 20)] == [True, False]
    assert [timeline.ends_epoch(step) for step in (8, 9, 19)] == [False, True, True]
    assert timeline.position_in_phase(timeline.at(19)) == (pytest.approx(1.95), 2)
    assert timeline.position_in_phase(timeline.at(20)) == (pytest.approx(0.05), 3)
    assert timeline.in_meta() == {"steps_per_epoch": 10, "source_only_epochs": 2}  # as 0.1 wrote it


def test_epochs_of_a_method_may_have_another_length() -> None:
    timeline = Timeline(steps_per_epoch=4, source_only_epochs=2, epochs=3, source_only_steps_per_epoch=10)
    assert timeline.total_steps == 32
    assert [timeline.at(step).epoch for step in (19, 20, 23, 24, 31)] == [-1, 0, 0, 1, 2]
    assert [step for step in range(32) if timeline.begins_epoch(step)] == [0, 10, 20, 24, 28]
    assert [step for step in range(32) if timeline.ends_epoch(step)] == [9, 19, 23, 27, 31]
    assert timeline.in_meta()["source_only_steps_per_epoch"] == 10
