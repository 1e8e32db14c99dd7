"""Curves and the heat map draw the given numbers; training curves take any key."""

import dataclasses
import math

import numpy as np
from matplotlib.figure import Figure

from ecn_dist.ranking.ranking import CameraPairs
from ecn_dist.reporting.curves import draw_camera_pairs, draw_result, draw_training_curves, weakest_camera_pairs
from tests.picture_cases import evaluation_of, pixels_of, random_case


def curves_of(figure: Figure) -> dict[str, list]:
    return {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}


def test_camera_pairs() -> None:
    values = np.array([[np.nan, 0.25, 0.75], [0.5, np.nan, 0.125], [1.0, 0.0, np.nan]])
    pairs = CameraPairs(np.array([2, 5, 7]), values, values, np.full((3, 3), 40))
    written = [text.get_text() for text in draw_camera_pairs(pairs).axes[0].texts]
    assert [text.removesuffix("\nn 40") for text in written] == ["-", "25", "75", "50", "-", "12", "100", "0", "-"]
    weakest = weakest_camera_pairs(pairs, count=2)
    assert [tuple(pair.values()) for pair in weakest] == [(7, 5, 0.0), (5, 7, 0.125)]
    assert len(weakest_camera_pairs(pairs, count=99)) == 6  # never a pair without a value


def test_cmc_and_precision_recall_draw_the_given_numbers() -> None:
    result = dataclasses.replace(
        evaluation_of(random_case(0)).result,
        cmc=np.linspace(0.5, 1.0, 50),
        recall_levels=np.array([0.0, 1.0]),
        precision_at_recall=np.array([0.8, 0.2]),
    )
    left, right = draw_result(result).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), 100 * result.cmc[:20])
    assert [text.get_text() for text in left.texts] == ["rank-1: 50.0", "rank-5: 54.1", "rank-10: 59.2"]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [80, 20])


def test_training_curves_draw_any_number_and_shade_the_source_only_epochs() -> None:
    rows: list[dict] = [
        {"step": step, "epoch": step // 4 - 2, "loss": 1.0, "loss_source": 2.0, "lr": 0.1, "anything": step}
        | {"loss_target": None if step < 8 else 3.0, "name": "no number", "flag": True}
        for step in range(16)
    ]
    rows[15] |= {"evaluation": {"mAP": 0.5, "rank1": 0.75}, "clusters": 7, "outliers": 2, "cluster_ami": 0.5}
    figure = draw_training_curves(rows)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles == [
        "loss",
        "evaluation, fraction",
        "learning rate",
        "clusters, outliers",
        "AMI of clusters and people",
        "anything",
    ]
    curves = curves_of(figure)
    assert curves["loss target"] == [[step, 3.0] for step in range(8, 16)]
    assert len(curves["loss"]) == 16
    assert curves["rank1"] == [[15, 0.75]]
    assert (curves["clusters"], curves["outliers"]) == ([[15, 7.0]], [[15, 2.0]])
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert set(words) == {"source only"}
    assert not [text for axes in draw_training_curves(rows[8:]).axes for text in axes.texts]


def test_long_training_curves_become_means() -> None:
    rows = [{"step": step, "epoch": 0, "loss": float(step % 2)} for step in range(10_000)]
    drawn = np.array(curves_of(draw_training_curves(rows))["loss"])
    assert len(drawn) <= 200
    np.testing.assert_allclose(drawn[:, 1], 0.5)


def test_training_curves_of_nothing_and_of_nonsense() -> None:
    assert draw_training_curves([]) is None
    nonsense = [{"step": 0, "loss": math.nan, "a": 10**400, "b": [1], "c": math.inf}, {"step": "x", "loss": 1}, {}]
    assert draw_training_curves(nonsense) is None
    assert math.isfinite(pixels_of(draw_training_curves([*nonsense, {"step": 1, "evaluation": 3, "x_$": 1}])).mean())


def test_only_the_keys_that_are_asked_for_are_drawn() -> None:
    rows = [{"step": 1, "loss": 1.0, "clusters": 7, "outliers": 2}]
    assert set(curves_of(draw_training_curves(rows, "cluster.*|outliers"))) == {"clusters", "outliers"}
    assert draw_training_curves(rows[:1], "lr") is None


def test_no_two_of_the_generators_six_losses_look_alike() -> None:
    losses = ("critic", "penalty", "camera_real", "generator", "camera", "cycle")
    lines = [{"step": step, **{f"loss_{name}": 1.0 for name in losses}} for step in range(4)]
    drawn = draw_training_curves(lines).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(drawn) == 6
