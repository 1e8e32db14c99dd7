"""The sheets of pictures: the right pictures in the right frames, read back from the pixels."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.reporting import montage
from ecn_dist.reporting.montage import Cell, Row
from ecn_dist.reporting.ranked import Match, RankedList
from ecn_dist.reporting.sheets import (
    PEOPLE,
    Domain,
    draw_answers,
    draw_clusters,
    draw_domains,
    draw_failures,
    draw_ranked_lists,
    draw_style_copies,
    pick_by_camera,
)
from tests.picture_cases import color_of, pixels_of, plain_picture

RIGHT, WRONG = montage.FRAMES["right"][0], montage.FRAMES["wrong"][0]


def area_of(pixels: np.ndarray, color: str | tuple[int, int, int]) -> int:
    """How many pixels have this colour, up to rounding."""
    rgb = np.round(255 * np.array(to_rgb(color))) if isinstance(color, str) else np.array(color)
    return int((np.abs(pixels.astype(int) - rgb).max(axis=2) <= 2).sum())


def gallery_picture(row: int) -> Image.Image:
    return plain_picture(100 + row)


def ranked_list(query: int, rights: list[bool], first_right: Match | None = None) -> RankedList:
    matches = tuple(Match(row=10 * query + i, rank=i + 1, right=right, camid=i % 3) for i, right in enumerate(rights))
    found = first_right or next((match for match in matches if match.right), None)
    return RankedList(query, 1, 0.125, matches, found, sum(rights))


def words_of(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        texts += [*(text.get_text() for text in axes.texts), axes.get_xlabel(), axes.get_title()]
    return "\n".join(texts)


def test_ranked_lists_show_every_picture_in_its_frame() -> None:
    lists = [ranked_list(0, [True, False, True]), ranked_list(1, [False, False, False])]
    figure = draw_ranked_lists(lists, plain_picture, gallery_picture, "Ranked lists", "")
    pixels = pixels_of(figure)
    for row in (0, 1, 100, 101, 102, 110, 111, 112):
        assert area_of(pixels, color_of(row)) == pytest.approx(0.74 * 1.48 * montage.DPI**2, rel=0.1)
    right, wrong = area_of(pixels, RIGHT), area_of(pixels, WRONG)
    only_right = pixels_of(draw_ranked_lists(lists[:1], plain_picture, gallery_picture, "", ""))
    assert area_of(only_right, RIGHT) == pytest.approx(right, rel=0.1)  # both right matches are in list 0
    assert 0 < area_of(only_right, WRONG) < 0.5 * wrong  # one of four
    words = words_of(figure)
    for text in ("✓ 1 · cam 0", "✗ 2 · cam 1", "✓ 3 · cam 2", "AP 12.5 %", "2 true matches", "first at rank 1"):
        assert text in words
    assert "No query has a true match" in words_of(draw_ranked_lists([], plain_picture, gallery_picture, "", ""))


def test_frame_and_sign_carry_the_verdict_without_colour() -> None:
    assert len({frame[1:] for verdict, frame in montage.FRAMES.items() if verdict != "query"}) == 2
    axes = montage.montage([Row("", [Cell(plain_picture(0), "", "wrong")])], title="").axes[0]
    assert axes.spines["left"].get_linestyle() == "--"


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

    assert np.abs(seen(RIGHT) - seen(WRONG)).max() > 0.2


def test_failures_show_wrong_and_right_answer_and_leave_out_what_is_none() -> None:
    best = Match(row=50, rank=1234, right=True, camid=2)
    lists = [ranked_list(0, [False], best), ranked_list(1, [True])]
    figure = draw_failures(lists, plain_picture, gallery_picture, "")
    pixels = pixels_of(figure)
    for color in (color_of(0), color_of(100), color_of(150)):  # query, first answer, best true match
        assert area_of(pixels, color) > 10_000
    assert area_of(pixels, color_of(1)) == area_of(pixels, color_of(110)) == 0
    assert "1,234 · cam 2" in words_of(figure)
    assert "query 1" not in words_of(figure)
    assert "None among these" in words_of(draw_failures(lists[1:], plain_picture, gallery_picture, ""))


def test_answers_show_distance_and_name() -> None:
    picture = plain_picture(1)
    answers = [("near.jpg", 0.25, plain_picture(2)), ("a name that is too long for a cell.jpg", 1.0, plain_picture(3))]
    figure = draw_answers([("q.jpg", picture, answers), ("$1$.jpg", picture, answers[:1])])
    words = words_of(figure)
    for text in ("query\nq.jpg", "query\n$1$.jpg", "1: 0.250\nnear.jpg", "2: 1.000\n… for a cell.jpg"):
        assert text in words
    pixels = pixels_of(figure)
    assert area_of(pixels, color_of(2)) == pytest.approx(2 * area_of(pixels, color_of(3)), rel=0.1)


def test_pictures_keep_their_proportions() -> None:
    wide = Image.new("RGB", (100, 50), (10, 200, 30))
    figure = montage.montage([Row("", [Cell(wide)])], title="")
    rows, columns = np.nonzero(np.abs(pixels_of(figure).astype(int) - (10, 200, 30)).max(axis=2) <= 2)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(2.0, rel=0.1)


def test_a_column_of_the_domain_sheet_is_one_person() -> None:
    pids = np.array([7, 7, 7, 8, 8, 9, -1, -1])
    camids = np.array([0, 1, 2, 0, 2, 1, 0, 1])
    rows = pick_by_camera(Domain("", camids, plain_picture, pids), [0, 1, 2], 4)
    assert rows[:, 0].tolist() == [0, 1, 2]  # seen by all cameras, so first
    assert rows[:, 1].tolist() == [3, -1, 4]
    assert rows[:, 2].tolist() == [-1, 5, -1]
    assert rows[:, 3].tolist() == [-1, -1, -1]  # a picture without identity is nobody's column
    without = pick_by_camera(Domain("", camids, plain_picture, np.full(8, -1)), [0, 1, 2], 2)
    for camera, line in enumerate(without):
        assert len(set(line.tolist())) == 2
        assert all(camids[row] == camera for row in line)


def test_domain_sheet_shows_its_pictures() -> None:
    left = Domain("left", np.array([0, 3]), plain_picture, np.array([-1, -1]))
    right = Domain("right", np.array([0, 0]), lambda row: plain_picture(2 + row), np.array([4, 5]))
    figure = draw_domains([left, right], per_camera=2)
    pixels = pixels_of(figure)
    assert min(area_of(pixels, color_of(row)) for row in range(4)) > 5_000
    words = words_of(figure)
    for text in ("left\ncamera 3", "left: 2 pictures; right: 2 pictures", "right\ncamera 0"):
        assert text in words
    many = Domain("many", np.arange(20), plain_picture, np.full(20, -1))
    assert many.shown_cameras()[:: len(many.shown_cameras()) - 1] == [0, 19]
    assert "8 of 20 cameras" in words_of(draw_domains([many], per_camera=1))


def test_style_sheet_asks_for_the_copies_of_other_cameras_only() -> None:
    asked = []

    def read_copy(row: int, camera: int) -> Image.Image:
        asked.append((row, camera))
        return plain_picture(10 * row + camera)

    domain = Domain("target", np.array([0, 1, 2]), plain_picture, np.array([5, 6, 7]))
    figure = draw_style_copies(domain, read_copy, count=3)
    assert sorted(asked) == [(row, camera) for row, camera in itertools.product(range(3), range(3)) if row != camera]
    pixels = pixels_of(figure)
    for color in [color_of(row) for row in (0, 1, 2, 10, 12, 20, 21)]:
        assert area_of(pixels, color) > 10_000
    assert words_of(figure).count("its own\ncamera") == 3


def cluster_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, pids and camids: clusters 0..5 of 9, 2, 4, 3, 4 and 2 pictures, and two outliers."""
    sizes = [9, 2, 4, 3, 4, 2]
    labels = np.repeat([*range(6), -1], [*sizes, 2])
    pids = np.repeat([7, 8, 7, 9, 5, 6, 4, 3, 1], [9, 2, 2, 2, 3, 2, 2, 2, 2])
    camids = np.array([row % 3 for row in range(len(labels))])
    camids[labels == 3] = 1  # one camera alone
    return labels, pids, camids


def test_cluster_sheet_shows_large_small_and_mixed_clusters_split_people_and_outliers() -> None:
    labels, pids, camids = cluster_case()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    read: list[int] = []

    def read_picture(row: int) -> Image.Image:
        read.append(row)
        return plain_picture(int(shuffled[row]))

    domain = Domain("target", camids[shuffled], read_picture, pids[shuffled])
    figure = draw_clusters(labels[shuffled], domain, count=1, members=4)
    words = words_of(figure)
    # The largest, of one person; the smallest; and of the others the most mixed, half one person and half another.
    for text in (
        "large\ncluster 0\n9 pictures\n3 cameras\n1 person",
        "small\ncluster 5\n2 pictures",
        "mixed\ncluster 2\n4 pictures\n3 cameras\n2 people",
        "split\nperson 7\n11 pictures\n3 cameras\n2 clusters",
        "outliers\n2 pictures\n2 cameras\n1 person",
    ):
        assert text in words
    flowing = " ".join(words.split())
    assert "6 clusters of 26 pictures; 2 of these are outliers" in flowing
    assert "4 clusters show one person alone; 1 of 8 people are in several clusters" in flowing
    shown = labels[shuffled[read]].tolist()
    assert shown == [0] * 4 + [5] * 2 + [2] * 4 + [0] * 3 + [2] + [-1] * 2
    assert pids[shuffled[read]].tolist()[6:10] in ([7, 7, 9, 9], [9, 9, 7, 7])  # the people stand together
    frames = [axes.spines["left"].get_edgecolor()[:3] for axes in figure.axes]
    assert frames == [to_rgb(PEOPLE[at]) for at in [0] * 6 + [0, 0, 1, 1] + [0, 0, 0, 1] + [0, 0]]
    names = [axes.get_xlabel().split("\n") for axes in figure.axes]  # not by colour alone
    assert [name for name, _ in names[:6]] == ["person 7"] * 4 + ["person 3"] * 2
    assert [name for name, _ in names[10:]] == ["cluster 0"] * 3 + ["cluster 2"] + ["person 1"] * 2
    assert [camera for _, camera in names] == [f"cam {camids[shuffled[row]]}" for row in read]
    pixels = pixels_of(figure)
    for row in read:
        assert area_of(pixels, color_of(int(shuffled[row]))) > 10_000


def test_cluster_sheet_without_pids_takes_those_across_cameras_as_mixed() -> None:
    labels, _, camids = cluster_case()
    domain = Domain("target", camids, plain_picture, np.full(len(labels), -1))
    figure = draw_clusters(labels, domain, count=1)
    words = words_of(figure)
    assert "mixed\ncluster 1" in words  # its only pair is by two cameras
    assert "mixed\ncluster 3" not in words_of(draw_clusters(labels, domain, count=2))
    assert "people" not in words
    assert "split" not in words
    assert {axes.spines["left"].get_edgecolor()[3] for axes in figure.axes} == {0.0}  # no frames
    none = draw_clusters(np.full(3, -1), Domain("target", camids[:3], plain_picture, np.full(3, -1)))
    assert "0 clusters of 3 pictures; 3 of these are outliers" in words_of(none)
