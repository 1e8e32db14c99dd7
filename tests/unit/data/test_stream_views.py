"""What a sample shows, how it is augmented, and plans that follow each other in one stream."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecn_dist.data import transforms
from ecn_dist.data.draws import Draws
from ecn_dist.data.identity_plan import IdentityPlan
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.loader import Batch
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.stream import EvaluationStream, TrainStream
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError
from tests.augment import augment_picture, prepare_picture
from tests.tiny_shards import write_split
from tests.unit.data.test_stream import batches, evaluated
from tests.unit.data.test_stream_bad_data import damage
from tests.unit.data.test_stream_loader import loader_workers

CAMERAS = 3
GREY_LEVEL = 1 / 255 / min(transforms.IMAGENET_STD)


@pytest.fixture
def split(tmp_path: Path) -> SplitIndex:
    return write_split(tmp_path, [20, 10, 20], num_cameras=CAMERAS, sizes=((32, 16), (41, 23)))


def identity_plan(split: SplitIndex, epoch: int = 0, **options: Any) -> IdentityPlan:
    numbers = {"identities": 3, "instances": 4, "seed": 1, "domain": "target", "epoch": epoch} | options
    return IdentityPlan(split.labels, split.indices, split.camids, **numbers)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(row, slot) of every picture that is read from now on."""
    read: list[tuple[int, int]] = []
    read_batch = ShardReader.read_batch

    def noted(self: ShardReader, split: SplitIndex, rows: Any, slots: Any) -> list[bytes]:
        read.extend(zip(np.asarray(rows).tolist(), np.asarray(slots).tolist(), strict=True))
        return read_batch(self, split, rows, slots)

    monkeypatch.setattr(ShardReader, "read_batch", noted)
    return read


def test_other_shows_each_of_the_other_cameras_and_never_the_own(
    split: SplitIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watch(monkeypatch)
    batches(split, last_step=4 * 30, style="other")
    chosen = np.array([(slot - split.camids[row]) % CAMERAS for row, slot in read])
    assert all(slot < CAMERAS for _, slot in read)
    assert np.abs(np.bincount(chosen, minlength=CAMERAS) / len(chosen) * 2 - [0, 1, 1]).max() < 0.1


def test_all_shows_the_picture_and_its_copies_side_by_side_each_with_its_own_draws(
    split: SplitIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watch(monkeypatch)
    (batch,) = batches(split, last_step=1, style="all")
    (real,) = batches(split, last_step=1, style="real")
    assert batch.images.shape == (12 * CAMERAS, 3, 32, 16)
    for name in ("labels", "pids", "camids", "indices"):
        assert torch.equal(getattr(batch, name), getattr(real, name).repeat_interleave(CAMERAS))
    draws, erase_draws = Draws(1, "target", "augmentation"), Draws(1, "target", "erasing")
    reader = ShardReader()
    for at, (row, slot) in enumerate(read[: 12 * CAMERAS]):
        others = [camera for camera in range(CAMERAS) if camera != split.camids[row]]
        assert slot == [CAMERAS, *others][at % CAMERAS]
        address = (at % CAMERAS, int(split.indices[row]), 0)  # so the first view is what "real" shows
        uniforms = draws.uniforms(transforms.NUM_DRAWS, address)[0].tolist()
        erase = erase_draws.uniforms(transforms.NUM_ERASE_DRAWS, address)[0].tolist()
        expected = augment_picture(reader.read_picture(split, row, slot), uniforms, erase, 32, 16, 0.5)
        assert (batch.images[at] - expected).abs().max() < 2.02 * GREY_LEVEL
    assert torch.equal(batch.images[::CAMERAS], real.images)


def test_evaluation_of_all_views_gives_the_picture_and_its_copies(split: SplitIndex) -> None:
    views = torch.cat([batch.images for batch in evaluated(split, 2, style="all")])
    indices = torch.cat([batch.indices for batch in evaluated(split, 2, style="all", workers=1)])
    assert indices.tolist() == split.indices.repeat(CAMERAS).tolist()
    reader = ShardReader()
    for row in (0, 23):
        slots = [CAMERAS] + [camera for camera in range(CAMERAS) if camera != split.camids[row]]
        for view, slot in enumerate(slots):
            expected = prepare_picture(reader.read_picture(split, row, slot), 40, 20)
            assert (views[CAMERAS * row + view] - expected).abs().max() < 2.02 * GREY_LEVEL


def test_a_sample_of_which_one_view_cannot_be_decoded_is_replaced_with_all_views(split: SplitIndex) -> None:
    (before,) = batches(split, last_step=1, style="all")
    index = int(before.indices[CAMERAS * 5])
    row = split.indices.tolist().index(index)
    damage(split, row, slots=range(CAMERAS))  # the picture itself is sound
    (after,) = batches(split, last_step=1, style="all", max_bad_samples=1)
    assert after.skipped == 1
    stand_in = int(split.indices[(row + 1) % 50])
    assert after.indices[CAMERAS * 5 : CAMERAS * 6].tolist() == [stand_in] * CAMERAS
    same = before.indices == after.indices
    assert torch.equal(before.images[same], after.images[same])
    with pytest.raises(UserError, match=rf"{index:08d}\.cam0\d\.jpg .* cannot be decoded"):
        batches(split, last_step=1, style="all")


def test_styles_that_no_split_of_one_camera_has_are_refused(tmp_path: Path) -> None:
    alone = write_split(tmp_path, [30], num_cameras=1)
    with pytest.raises(UserError, match="has one camera"):
        batches(alone, style="other")
    assert torch.equal(batches(alone, style="all")[0].images, batches(alone, style="real")[0].images)


def padded(picture: np.ndarray, down: int, right: int, flip: bool, padding: int) -> np.ndarray:
    """The definition: padded with black, then cut."""
    height, width, _ = picture.shape
    wide = np.pad(picture[:, ::-1] if flip else picture, ((padding, padding), (padding, padding), (0, 0)))
    return wide[padding + down : padding + down + height, padding + right : padding + right + width]


def test_pad_moves_the_whole_picture_by_up_to_the_padding() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(1, 256, (64, 32, 3), dtype=np.uint8)
    draws_bK = Draws(0, "target", "augmentation").uniforms(transforms.NUM_DRAWS, (0, np.arange(300), 0))
    moves = set()
    for draws in draws_bK.tolist():
        out = torch.empty(64, 32, 3, dtype=torch.uint8)
        transforms.augment_into(out, picture, draws, Augmentation("pad"))
        down, right = (int(draw * 5) - 2 for draw in draws[transforms.CROP_TRIES : transforms.CROP_TRIES + 2])
        assert (out.numpy() == padded(picture, down, right, draws[transforms.FLIP] < 0.5, 2)).all()
        moves.add((down, right))
    assert len(moves) == 25  # 10 pixels at height 256 are 2 or 3 at 64; rounded to the even


@pytest.mark.parametrize("kind", ["ecn", "pad"])
def test_an_evaluation_in_inference_mode_may_come_before_training(split: SplitIndex, kind: Any) -> None:
    how = Augmentation(kind)
    expected = batches(split, last_step=2, augmentation=how)
    with ThreadPoolExecutor(1) as fresh_thread, torch.inference_mode():  # where no memory was used before
        found = fresh_thread.submit(_evaluate_then_train, split, how).result()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)


def _evaluate_then_train(split: SplitIndex, how: Augmentation) -> list[Batch]:
    with torch.inference_mode():
        evaluated(split, 1, style="all")
    return batches(split, last_step=2, augmentation=how)


def test_pad_erases_larger_boxes_with_the_mean(split: SplitIndex) -> None:
    how = Augmentation("pad", 1.0)
    draws = Draws(0, "target", "erasing").uniforms(transforms.NUM_ERASE_DRAWS, (0, np.arange(2000), 0)).tolist()
    height, width = np.array([transforms.erase_box(row, 256, 128, how) for row in draws]).T[2:]
    area = height * width / (256 * 128)
    assert 0.018 < area.min() < 0.03
    assert 0.38 < area.max() < 0.402
    for batch in batches(split, last_step=2, augmentation=how, style="real"):
        assert (batch.images == 0).all(dim=1).flatten(1).any(dim=1).all()


def identity_batches(stream: TrainStream, last_step: int = 4) -> list[Batch]:
    return list(stream.batches(0, last_step))


@pytest.mark.parametrize("workers", [0, 2])
def test_plans_follow_each_other_without_new_workers(split: SplitIndex, workers: int) -> None:
    options: dict[str, Any] = {"height": 32, "width": 16, "style": "random"}
    stream = TrainStream(split, identity_plan(split), workers=workers, **options)
    assert not loader_workers()
    pids = set()
    for epoch in range(3):
        clusters = np.where(split.labels == epoch, -1, split.labels)
        plan = IdentityPlan(
            clusters, split.indices, split.camids, identities=3, instances=4, seed=1, domain="target", epoch=epoch
        )
        stream.replan(plan)
        expected = identity_batches(TrainStream(split, plan, **options))
        for this, that in zip(identity_batches(stream), expected, strict=True):
            assert torch.equal(this.images, that.images)
            assert torch.equal(this.labels, that.labels)
            rows = [split.indices.tolist().index(index) for index in this.indices.tolist()]
            assert this.labels.tolist() == clusters[rows].tolist()
            assert (this.labels >= 0).all()
        pids |= {worker.pid for worker in loader_workers()}
    assert len(pids) == workers
    next(stream.batches(0, 9))  # left in its midst
    assert torch.equal(identity_batches(stream)[0].images, expected[0].images)
    stream.close()


def test_a_picture_that_comes_again_is_drawn_anew(tmp_path: Path) -> None:
    split = write_split(tmp_path, [6], num_identities=3)  # two pictures of each
    (batch,) = identity_batches(TrainStream(split, identity_plan(split), height=32, width=16), 1)
    for turn in range(0, 12, 4):
        of_turn = batch.indices[turn : turn + 4].tolist()
        assert len(set(of_turn)) == 2
        first, again = (turn + at for at in range(4) if of_turn[at] == of_turn[0])
        assert not torch.equal(batch.images[first], batch.images[again])


def test_an_identitys_stand_in_keeps_the_label(split: SplitIndex) -> None:
    plan = identity_plan(split)
    row = int(plan.step(0).rows_b[2])
    damage(split, row)
    stream = TrainStream(split, plan, height=32, width=16, max_bad_samples=9)
    (batch,) = identity_batches(stream, 1)
    assert batch.skipped == 1
    assert batch.labels.tolist() == split.labels[plan.step(0).rows_b].tolist()
    assert batch.indices[2] == split.indices[plan.stand_ins(row)[0]]


def test_a_plan_of_another_kind_of_batch_is_refused(split: SplitIndex) -> None:
    stream = TrainStream(split, identity_plan(split), height=32, width=16)
    with pytest.raises(ValueError, match="global_batch_size"):
        stream.replan(identity_plan(split, instances=2))
    with pytest.raises(ValueError, match="style"):
        EvaluationStream(split, height=32, width=16, batch_size=4, style="none")  # type: ignore[arg-type]
