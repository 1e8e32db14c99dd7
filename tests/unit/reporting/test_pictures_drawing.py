"""What is drawn: the right pictures in the right frames, read back from the pixels."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ecn_dist.errors import UserError
from ecn_dist.ranking import FeatureSet, evaluate_ranking
from ecn_dist.reporting.pictures import (
    Domain,
    Match,
    RankedList,
    by_camera,
    draw_camera_pairs,
    draw_cmc,
    draw_domains,
    draw_failures,
    draw_precision_recall,
    draw_ranked_lists,
    draw_style_copies,
    draw_training_curves,
    save_figure,
    weakest_camera_pairs,
    write_run_figures,
)
from ecn_dist.reporting.pictures import canvas as style
from ecn_dist.reporting.pictures.canvas import pixels_of
from ecn_dist.reporting.pictures.sheets import pick_by_camera
from ecn_dist.reporting.run_reader import read_figure
from tests.picture_cases import color_of, plain_picture, random_case


def rgb(color: str | tuple[int, int, int]) -> np.ndarray:
    """An 8-bit colour."""
    return np.round(255 * np.array(to_rgb(color))).astype(int) if isinstance(color, str) else np.array(color)


def area_of(pixels: np.ndarray, color: str | tuple[int, int, int]) -> int:
    """How many pixels have this colour, up to rounding."""
    return int((np.abs(pixels.astype(int) - rgb(color)).max(axis=2) <= 2).sum())


def gallery_picture(row: int) -> Image.Image:
    return plain_picture(100 + row)


def ranked_list(query: int, rights: list[bool], first_right: Match | None = None) -> RankedList:
    matches = tuple(
        Match(row=10 * query + i, rank=i + 1, distance=0.1 * i, right=right, camid=i % 3)
        for i, right in enumerate(rights)
    )
    found = first_right or next((match for match in matches if match.right), None)
    return RankedList(query, 1, matches, found, sum(rights))


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_ranked_lists_show_every_picture_in_its_frame() -> None:
    lists = [ranked_list(0, [True, False, True]), ranked_list(1, [False, False, False])]
    figure = draw_ranked_lists(lists, plain_picture, gallery_picture, average_precision_Q=np.array([0.5, 0.125]))
    pixels = pixels_of(figure)
    cell = area_of(pixels, color_of(0))
    assert cell > 10_000
    for row in (0, 1):
        assert area_of(pixels, color_of(row)) == pytest.approx(cell, rel=0.02)
    for row in (0, 1, 2, 10, 11, 12):
        assert area_of(pixels, color_of(100 + row)) == pytest.approx(cell, rel=0.05)
    right, wrong = area_of(pixels, style.RIGHT), area_of(pixels, style.WRONG)
    only_right = pixels_of(draw_ranked_lists(lists[:1], plain_picture, gallery_picture))
    assert area_of(only_right, style.RIGHT) == pytest.approx(right, rel=0.1)  # both right matches are in list 0
    assert 0 < area_of(only_right, style.WRONG) < 0.5 * wrong  # one of four
    words = words_of(figure)
    for text in ("1 · cam 0", "3 · cam 2", "AP 12.5 %", "2 true matches", "first at rank 1"):
        assert text in words


def test_a_tick_and_a_cross_carry_the_verdict_without_colour() -> None:
    def sign(verdict: style.Verdict) -> np.ndarray:
        """The strokes inside the disc on the picture's corner, by brightness alone."""
        sheet = style.Sheet(1.0, 1.5)
        sheet.picture(plain_picture(0), 0.4, 0.4, 0.5, 1.0, verdict=verdict)
        gray = np.asarray(Image.fromarray(pixels_of(sheet.figure)).convert("L"))
        corner = round(0.415 * style.DPI)
        return gray[corner - 7 : corner + 8, corner - 7 : corner + 8] > 180

    tick, cross = sign("right"), sign("wrong")
    assert 20 < tick.sum() < 150
    assert 20 < cross.sum() < 150
    assert (tick != cross).sum() > 25
    assert (cross == cross[:, ::-1]).mean() > 0.8  # a cross is its own mirror image,
    assert (tick == tick[:, ::-1]).mean() < 0.8  # a tick is not


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ],
    ids=["deuteranopia", "protanopia"],  # Machado, Oliveira and Fernandes 2009, severity 1, on linear light
)
def test_right_and_wrong_differ_to_colour_blind_eyes(matrix: list[list[float]]) -> None:
    def seen(color: str) -> np.ndarray:
        encoded = np.array(to_rgb(color))
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(matrix) @ linear, 0, 1)
        return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)

    assert np.abs(seen(style.RIGHT) - seen(style.WRONG)).max() > 0.2


def test_failures_show_wrong_and_right_answer_and_leave_out_what_is_none() -> None:
    best = Match(row=50, rank=1234, distance=0.7, right=True, camid=2)
    lists = [ranked_list(0, [False], best), ranked_list(1, [True])]
    figure = draw_failures(lists, plain_picture, gallery_picture)
    pixels = pixels_of(figure)
    for color in (color_of(0), color_of(100), color_of(150)):  # query, first answer, best true match
        assert area_of(pixels, color) > 10_000
    assert area_of(pixels, color_of(1)) == area_of(pixels, color_of(110)) == 0
    assert "rank 1,234 · cam 2" in words_of(figure)
    assert "query 1" not in words_of(figure)
    assert "None among these" in words_of(draw_failures(lists[1:], plain_picture, gallery_picture))


def test_pictures_keep_their_proportions() -> None:
    wide = Image.new("RGB", (100, 50), (10, 200, 30))
    figure = draw_ranked_lists([ranked_list(0, [])], lambda row: wide, gallery_picture)
    rows, columns = np.nonzero(np.abs(pixels_of(figure).astype(int) - (10, 200, 30)).max(axis=2) <= 2)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(2.0, rel=0.1)


def test_camera_pairs() -> None:
    values = np.array([[np.nan, 0.25, 0.75], [0.5, np.nan, 0.125], [1.0, 0.0, np.nan]])
    counts = np.full((3, 3), 40)
    figure = draw_camera_pairs(values, counts, cameras=[2, 5, 7])
    written = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in written if text != "n 40"] == ["-", "25", "75", "50", "-", "12", "100", "0", "-"]
    weakest = weakest_camera_pairs(values, counts, [2, 5, 7], count=2)
    assert [tuple(pair) for pair in weakest] == [(7, 5, 0.0, 40), (5, 7, 0.125, 40)]
    assert len(weakest_camera_pairs(values, count=99)) == 6  # never a pair without a value
    with pytest.raises(UserError, match="square"):
        draw_camera_pairs(np.zeros((2, 3)))


def test_cmc_and_precision_recall_draw_the_given_numbers() -> None:
    cmc = np.linspace(0.5, 1.0, 50)
    lines = draw_cmc({"a": cmc, "b": cmc / 2}).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), 100 * cmc[:20])
    np.testing.assert_allclose(lines[1].get_ydata(), 50 * cmc[:20])
    assert lines[0].get_linestyle() != lines[1].get_linestyle()  # not told apart by colour alone
    assert "rank-1: 50.0" in words_of(draw_cmc({"": cmc}))
    (line,) = draw_precision_recall({"": (np.array([0.0, 1.0]), np.array([0.8, 0.2]))}).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [80, 20])


def test_training_curves_leave_gaps_and_shade_the_source_only_epochs() -> None:
    rows = [
        {
            "step": step,
            "epoch": step // 4 - 2,
            "loss": 1.0,
            "loss_source": 2.0,
            "loss_target": None if step < 8 else 3.0,
            "lr": 0.1,
            "images_per_second": 100.0,
        }
        for step in range(16)
    ]
    rows[15] |= {"evaluation": {"mAP": 0.5, "rank1": 0.75}}
    figure = draw_training_curves(rows)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss", "Result on the target while training", "Learning rate", "Speed"]  # no data_wait: no panel
    curves = {line.get_label(): line.get_xydata() for axes in figure.axes for line in axes.lines}
    assert curves["target"].tolist() == [[step, 3.0] for step in range(8, 16)]
    assert len(curves["total"]) == 16
    assert curves["rank-1"].tolist() == [[15, 75.0]]
    assert "source only" in words_of(figure)
    assert "source only" not in words_of(draw_training_curves(rows[8:]))
    flat = draw_training_curves([{"step": 3, "epoch": 0, "mAP": 0.5}])  # the result beside the step's other numbers
    assert flat.axes[0].lines[0].get_xydata().tolist() == [[3, 50.0]]


def test_long_training_curves_become_means_in_a_band() -> None:
    rows = [{"step": step, "epoch": 0, "loss": float(step % 2)} for step in range(10_000)]
    axes = draw_training_curves(rows).axes[0]
    drawn = axes.lines[0].get_xydata()
    assert len(drawn) <= 200
    np.testing.assert_allclose(drawn[:, 1], 0.5)
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.0, 1.0)


def test_training_curves_without_a_step_say_so() -> None:
    assert "No step was logged" in words_of(draw_training_curves([]))
    assert math.isfinite(pixels_of(draw_training_curves([{"step": 0, "loss": math.nan}])).mean())


def test_a_column_of_the_domain_sheet_is_one_person() -> None:
    pids = np.array([7, 7, 7, 8, 8, 9, -1, -1])
    camids = np.array([0, 1, 2, 0, 2, 1, 0, 1])
    rows = pick_by_camera(camids, pids, [0, 1, 2], 4, seed=0)
    assert rows[:, 0].tolist() == [0, 1, 2]  # seen by all cameras, so first
    assert rows[:, 1].tolist() == [3, -1, 4]
    assert rows[:, 2].tolist() == [-1, 5, -1]
    assert rows[:, 3].tolist() == [-1, -1, -1]  # a picture without identity is nobody's column
    without = pick_by_camera(camids, None, [0, 1, 2], 2, seed=0)
    for camera, line in enumerate(without):
        assert len(set(line.tolist())) == 2
        assert all(camids[row] == camera for row in line)


def test_domain_sheet_shows_its_pictures() -> None:
    left = by_camera({0: [plain_picture(0)], 3: [plain_picture(1)]}, "left")
    right = Domain("right", np.array([0, 0]), lambda row: plain_picture(2 + row), np.array([4, 5]))
    figure = draw_domains([left, right], per_camera=2)
    pixels = pixels_of(figure)
    areas = [area_of(pixels, color_of(row)) for row in range(4)]
    assert min(areas) > 5_000
    assert "cam 3" in words_of(figure)


def test_style_sheet_asks_for_the_copies_of_other_cameras_only() -> None:
    asked = []

    def read_copy(row: int, camera: int) -> Image.Image | None:
        asked.append((row, camera))
        return None if camera == 2 else plain_picture(10 * row + camera)

    domain = Domain("target", np.array([0, 1, 2]), plain_picture, np.array([5, 6, 7]))
    figure = draw_style_copies(domain, read_copy, count=3)
    assert sorted(asked) == [(row, camera) for row, camera in itertools.product(range(3), range(3)) if row != camera]
    pixels = pixels_of(figure)
    for color in [color_of(row) for row in range(3)] + [color_of(1), color_of(10), color_of(20), color_of(21)]:
        assert area_of(pixels, color) > 10_000
    assert words_of(figure).count("no copy") == 2


def test_a_figure_carries_its_words(tmp_path) -> None:
    path = save_figure(
        draw_cmc({"": np.ones(50)}), tmp_path / "deep" / "cmc.png", title="<CMC> “π”", caption="100 % & more"
    )
    found = read_figure(path)
    assert (found.title, found.caption) == ("<CMC> “π”", "100 % & more")
    assert (found.width, found.height) == Image.open(path).size
    assert list(path.parent.iterdir()) == [path]  # no unfinished file


def test_all_figures_of_a_run(tmp_path) -> None:
    case = random_case(0, queries=12)
    query, gallery = FeatureSet(*case[:3]), FeatureSet(*case[3:])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 2.0}\n')
    domain = Domain("target", gallery.camids.numpy(), plain_picture, gallery.pids.numpy())
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    written = write_run_figures(
        tmp_path,
        evaluate_ranking(*case, camera_pairs=True),
        query,
        gallery,
        read_query=plain_picture,
        read_gallery=gallery_picture,
        domains=[domain, domain],
        read_copy=lambda row, camera: plain_picture(row),
        queries=2,
        failures=2,
        top=3,
        writer=writer,
        step=7,
    )
    writer.close()
    names = ["ranked_best", "ranked_worst", "ranked_random", "failures", "cmc", "precision_recall", "camera_pairs"]
    names += ["domains", "style_copies", "training"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    assert all(read_figure(path).caption for path in written)
    assert "Weakest: camera" in read_figure(tmp_path / "figures" / "camera_pairs.png").caption
    logged = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert all(f"figures/{name}".encode() in logged for name in names)


def test_figures_without_cameras(tmp_path) -> None:
    features, pids, _, gallery_features, gallery_pids, _ = random_case(0, queries=12)
    result = evaluate_ranking(features, pids, None, gallery_features, gallery_pids, None)
    unused = torch.zeros_like
    written = write_run_figures(
        tmp_path,
        result,
        FeatureSet(features, pids, unused(pids)),
        FeatureSet(gallery_features, gallery_pids, unused(gallery_pids)),
        read_query=plain_picture,
        read_gallery=gallery_picture,
        camera_free=True,
        queries=1,
        failures=1,
        top=2,
    )
    names = ["ranked_best", "ranked_worst", "ranked_random", "failures", "cmc", "precision_recall"]
    assert [path.stem for path in written] == names
    assert "same camera" not in read_figure(written[0]).caption
