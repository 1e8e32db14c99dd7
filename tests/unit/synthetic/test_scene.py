"""Pictures of synthetic domains: they hold people, whom clothes tell apart, and cameras that differ."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecn_dist.packing.styles import in_styles, picture_histogram, style_tables
from ecn_dist.synthetic import PRESETS, SOURCE, TARGET, Studio, pids_of
from ecn_dist.synthetic.camera import expose
from ecn_dist.synthetic.person import PATTERNS


def test_seed_and_name_make_other_people() -> None:
    def person(spec: Any, seed: int) -> Any:
        return Studio(spec, seed=seed, cameras=2, height=32, width=16).person(1)

    assert person(SOURCE, 0) == person(SOURCE, 0)
    assert person(SOURCE, 0) != person(SOURCE, 1)
    assert person(SOURCE, 0) != person(TARGET, 0)


@pytest.mark.parametrize("spec", PRESETS.values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("size", [(16, 8), (64, 32), (256, 128), (100, 60)])
def test_pictures_hold_a_person(spec: Any, size: tuple[int, int]) -> None:
    """The middle, where the person is, tells people apart: were the pictures all of one person, the variance of the
    means of 4 would be about 0.3 of that within them."""
    height, width = size
    studio = Studio(spec, seed=0, cameras=2, height=height, width=width)
    rows, columns = slice(round(0.3 * height), round(0.7 * height)), slice(round(0.35 * width), round(0.65 * width))
    colors = []
    for pid in pids_of("train", 8):
        person = studio.person(pid)
        pictures = [np.asarray(studio.picture(person, pid, 0, number), np.float64) for number in range(4)]
        assert all(picture.shape == (height, width, 3) for picture in pictures)
        colors.append([picture[rows, columns].mean((0, 1)) for picture in pictures])
    within = np.var(colors, axis=1).sum()
    between = 8 * np.var(np.mean(colors, axis=1), axis=0).sum()
    assert between > 0.7 * within


def test_patterns_tell_people_apart_who_wear_the_same_colours() -> None:
    """Of the target's people, most wear one of the four patterns, each of them somebody."""
    studio = Studio(TARGET, seed=0, cameras=2, height=64, width=32)
    worn = [studio.person(pid).upper.pattern for pid in pids_of("train", 80)]
    assert set(worn) == {"plain", *PATTERNS}
    assert worn.count("plain") < 20
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 60), np.linspace(0, 4, 80))
    seen = [PATTERNS[name](x, y).mean((0, 1)) for name in PATTERNS]
    assert all(0.3 < share < 0.6 for share in seen)
    for one, other in permutations(PATTERNS.values(), 2):
        assert (one(x, y) != other(x, y)).mean() > 0.3


def unlike_after_matching(spec: Any) -> float:
    """How much of what two cameras make different of the same scenes is left after the best curve of each channel."""
    studio = Studio(spec, seed=0, cameras=4, height=64, width=32)
    scenes = [studio.picture(studio.person(pid), pid, 0, 0) for pid in pids_of("test", 12)]
    still = np.zeros((64, 32, 4), np.float32)
    seen = [[expose(camera, scene, 1.0, still) for scene in scenes] for camera in studio.cameras]
    tables = style_tables(np.stack([sum(map(picture_histogram, pictures)) for pictures in seen]))

    def distance(one: list[Image.Image], other: list[Image.Image]) -> float:
        return float(np.mean(np.abs(np.stack(one).astype(float) - np.stack(other).astype(float))))

    pairs = list(permutations(range(4), 2))
    matched = [distance([in_styles(p, tables[a], [b])[b] for p in seen[a]], seen[b]) for a, b in pairs]
    return sum(matched) / sum(distance(seen[a], seen[b]) for a, b in pairs)


@pytest.mark.parametrize("name", ["source", "target"])
def test_strong_cameras_are_beyond_curves_of_each_channel(name: str) -> None:
    assert unlike_after_matching(PRESETS[f"{name}-strong"]) > 1.5 * unlike_after_matching(PRESETS[name])
