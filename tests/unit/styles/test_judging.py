"""The figures of copies, where what they must be is known."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecn_dist.config import Config, DataConfig
from ecn_dist.data import SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.models import Backbone
from ecn_dist.styles import judging
from ecn_dist.styles.judging import HISTOGRAM, LEARNT, REAL, Looked, draw_sheet, find_originals, see_cameras
from tests.tiny_shards import write_split

CPU = torch.device("cpu")
TINTS = np.array([[1.0, 0.3, 0.3], [0.3, 1.0, 0.3], [0.3, 0.3, 1.0]])


@pytest.fixture
def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Looked:
    """Cameras that tint; learnt copies have the wanted camera's tint, histogram copies only the name of it."""
    monkeypatch.setattr(judging, "CLASSIFIER_STEPS", 80)
    split, reader = write_split(tmp_path, [48, 24], styles=False, sizes=((16, 8),)), ShardReader()

    def tinted(row: int, camid: int) -> Image.Image:
        return Image.fromarray((np.asarray(reader.read_picture(split, row)) * TINTS[camid]).astype(np.uint8))

    def unchanged(row: int, camid: int) -> Image.Image:
        return tinted(row, split.camids[row])

    return Looked(split, np.arange(len(split)), {REAL: unchanged, HISTOGRAM: unchanged, LEARNT: tinted})


def test_a_classifier_sees_the_wanted_camera_in_what_shows_it(looked: Looked) -> None:
    assert see_cameras(looked, CPU) == {REAL: 1.0, HISTOGRAM: 0.0, LEARNT: 1.0}


def test_an_original_is_found_by_what_is_still_like_it(looked: Looked) -> None:
    torch.manual_seed(0)
    backbone = Backbone("small_resnet", 32, 16).eval()
    shows = dict(looked.shows) | {LEARNT: lambda row, camid: looked.shows[REAL]((row + 1) % 72, camid)}
    config = Config(data=DataConfig(height=32, width=16))
    assert find_originals(Looked(looked.split, looked.rows_n, shows), backbone, config, CPU) == {
        HISTOGRAM: 1.0,
        LEARNT: 0.0,
    }


def test_every_picture_has_a_copy_of_another_camera(looked: Looked) -> None:
    for kind in (HISTOGRAM, LEARNT):
        pictures, camids_n = looked.pictures(kind)
        assert len(pictures) == 72
        assert (camids_n != looked.split.camids).all()
        assert len(np.unique(camids_n)) == 3
    assert (looked.pictures(REAL)[1] == looked.split.camids).all()


@pytest.mark.parametrize("known", [True, False])
def test_the_sheet(looked: Looked, known: bool) -> None:
    """One person a block where people are known; where they are not, one picture."""
    split: SplitIndex = looked.split
    if not known:
        split.__dict__["pids"] = np.full(len(split), -1)
    drawn = Image.open(io.BytesIO(draw_sheet(looked, "The words.")))
    assert drawn.height > 5 * 3 * 200
