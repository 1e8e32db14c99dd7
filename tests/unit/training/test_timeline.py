"""Schedules of formulas.md."""

import math

import pytest

from ecn_dist.config import OptimConfig
from ecn_dist.training.timeline import Timeline


def factor(epoch: float, schedule: str, warmup: float = 0.0, steps: tuple[int, ...] = (40,), alone: int = 0) -> float:
    """At the step whose middle is `epoch` of the 60, after `alone` on the source: epochs of 500 steps and 100."""
    optim = OptimConfig(schedule=schedule, warmup_epochs=warmup, step_epoch=list(steps))
    timeline = Timeline(steps_per_epoch=500, source_only_epochs=alone, epochs=60, source_only_steps_per_epoch=100)
    number = alone * 100 + epoch * 500 - 0.5
    assert number == pytest.approx(round(number))
    return timeline.learning_rate_factor(timeline.at(round(number)), optim)


@pytest.mark.parametrize("alone", [0, 7])
def test_step_schedule_divides_by_ten_at_its_epoch(alone: int) -> None:
    epochs = (0.001, 39.999, 40.001, 59.001)
    assert [factor(e, "step", alone=alone) for e in epochs] == [1, 1, 0.1, 0.1]
    found = [factor(e, "step", steps=(20, 40), alone=alone) for e in (19.999, 20.001, 40.001)]
    assert found == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("alone", [0, 7])
def test_cosine_falls_to_zero(alone: int) -> None:
    for epoch in (0.001, 30.001, 59.999):
        assert factor(epoch, "cosine", alone=alone) == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 60)))


def test_warm_up_is_linear_and_meets_the_schedule() -> None:
    assert [factor(e, "step", 2.0) for e in (0.501, 1.001, 2.001)] == pytest.approx([0.2505, 0.5005, 1.0])
    assert factor(31.001, "cosine", 2.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 29.001 / 58)))


def test_the_source_alone_has_a_schedule_of_its_own() -> None:
    timeline = Timeline(steps_per_epoch=500, source_only_epochs=4, epochs=60, source_only_steps_per_epoch=100)
    cosine, step = OptimConfig(schedule="cosine", warmup_epochs=1), OptimConfig(step_epoch=1)
    middle = timeline.at(249)  # of 100 steps each, its middle at epoch 2.495
    assert timeline.learning_rate_factor(middle, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi * 1.495 / 3)))
    assert timeline.learning_rate_factor(middle, step) == 1
    assert timeline.learning_rate_factor(timeline.at(400), cosine) == pytest.approx(0.001)


def test_timeline_counts_source_only_epochs_apart() -> None:
    timeline = Timeline(steps_per_epoch=10, source_only_epochs=2, epochs=3, source_only_steps_per_epoch=10)
    assert timeline.total_steps == 50
    assert [timeline.at(step).epoch for step in (0, 9, 10, 19, 20, 49)] == [-2, -2, -1, -1, 0, 2]
    assert [timeline.at(step).source_only for step in (19, 20)] == [True, False]
    assert [timeline.ends_epoch(step) for step in (8, 9, 19)] == [False, True, True]
    assert timeline.in_meta() == {"steps_per_epoch": 10, "source_only_epochs": 2}  # as 0.1 wrote it


def test_epochs_of_a_method_may_have_another_length() -> None:
    timeline = Timeline(steps_per_epoch=4, source_only_epochs=2, epochs=3, source_only_steps_per_epoch=10)
    assert timeline.total_steps == 32
    assert [timeline.at(step).epoch for step in (19, 20, 23, 24, 31)] == [-1, 0, 0, 1, 2]
    assert [step for step in range(32) if timeline.begins_epoch(step)] == [0, 10, 20, 24, 28]
    assert [step for step in range(32) if timeline.ends_epoch(step)] == [9, 19, 23, 27, 31]
    assert timeline.in_meta()["source_only_steps_per_epoch"] == 10
