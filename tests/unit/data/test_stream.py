"""Streams: the planned batches, the same for any ranks and workers, from any step on, with nothing read twice."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecn_dist.data import transforms
from ecn_dist.data.cache import FOLDER_VARIABLE, GIB_VARIABLE
from ecn_dist.data.dataset import PictureDataset
from ecn_dist.data.draws import Draws
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.loader import NO_LABEL, Batch
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.stream import EvaluationStream, TrainStream
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError
from tests.augment import augment_picture, prepare_picture
from tests.http_server import FolderServer
from tests.tiny_shards import write_split
from tests.unit.data.test_stream_loader import loader_workers, within

BATCH = 12
SHARDS = {1: [50], 3: [20, 3, 27], 40: [1, 1, 1, 2] * 10}
SIZES = ((32, 16), (41, 23))


@pytest.fixture(scope="module", params=SHARDS)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SplitIndex:
    return write_split(tmp_path_factory.mktemp("shards"), SHARDS[request.param], sizes=SIZES)


@pytest.fixture
def small(tmp_path: Path) -> SplitIndex:
    return write_split(tmp_path, [20, 10, 20], sizes=SIZES)


def dataset_of(stream: TrainStream) -> PictureDataset:
    return stream._loader.dataset


PLAN_OPTIONS = ("global_batch_size", "streams", "seed", "domain", "window")


def train_stream(split: SplitIndex, **options: Any) -> TrainStream:
    """A stream over passes. Options are the plan's or the stream's."""
    plan: dict[str, Any] = {"global_batch_size": BATCH, "streams": 12, "seed": 1, "domain": "target", "window": 20}
    stream: dict[str, Any] = {"height": 32, "width": 16, "style": "random"}
    for name, value in options.items():
        (plan if name in PLAN_OPTIONS else stream)[name] = value
    labels = split.labels if plan["domain"] == "source" else None
    return TrainStream(split, PassPlan(split.shard_samples, labels=labels, **plan), **stream)


def batches(split: SplitIndex, first_step: int = 0, last_step: int = 9, **options: Any) -> list[Batch]:
    """The nine first are of three passes."""
    return list(train_stream(split, **options).batches(first_step, last_step))


def globally(split: SplitIndex, world_size: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The global batches, put together from the ranks' parts."""
    ranks = [batches(split, rank=r, world_size=world_size, **options) for r in range(world_size)]
    assert all(batch.error is None for parts in ranks for batch in parts)
    names = ("images", "labels", "pids", "camids", "indices")
    return [
        {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        for parts in zip(*ranks, strict=True)
    ]


def assert_equal(these: list[dict[str, torch.Tensor]], those: list[dict[str, torch.Tensor]]) -> None:
    for this, that in zip(these, those, strict=True):
        assert all(torch.equal(this[name], that[name]) for name in this)


def test_global_batches_are_identical_for_any_ranks_and_workers(split: SplitIndex) -> None:
    expected = globally(split, 1)
    passes = [torch.cat([batch["indices"] for batch in expected[at : at + 4]]).tolist() for at in (0, 4)]
    for order in passes:
        assert len(set(order)) == len(order) == 48
    assert passes[0] != passes[1]
    for world_size, workers in ((1, 2), (2, 0), (2, 1), (3, 0), (4, 0)):
        assert_equal(globally(split, world_size, workers=workers), expected)


def test_stopping_after_any_step_continues_with_the_batch_that_would_have_come(split: SplitIndex) -> None:
    expected = globally(split, 2)
    for first_step in range(1, 9):
        assert_equal(globally(split, 3, first_step=first_step), expected[first_step:])
    assert_equal(globally(split, 1, first_step=3, workers=2), expected[3:])


def test_pictures_are_the_drawn_copies_augmented_as_defined(small: SplitIndex) -> None:
    reader, draws, erase_draws = ShardReader(), Draws(1, "target", "augmentation"), Draws(1, "target", "erasing")
    row_of = {int(index): row for row, index in enumerate(small.indices)}
    seen = set()
    for step, batch in enumerate(batches(small)):
        for image, index, pid, camid in zip(batch.images, batch.indices, batch.pids, batch.camids, strict=True):
            row = row_of[int(index)]
            assert pid == small.pids[row]
            assert camid == small.camids[row]
            address = (0, int(index), step // 4)
            uniforms = draws.uniforms(transforms.NUM_DRAWS, address)[0].tolist()
            erase = erase_draws.uniforms(transforms.NUM_ERASE_DRAWS, address)[0].tolist()
            camera = int(transforms.draw_camera(np.array(uniforms[transforms.CAMERA]), 3))
            picture = reader.read_picture(small, row, 3 if camera == camid else camera)
            expected = augment_picture(picture, uniforms, erase, 32, 16, 0.5)
            assert (image - expected).abs().max() < 2.02 / 255 / 0.224
            seen.add(camera == int(camid))
    assert seen == {True, False}


def test_cameras_are_drawn_evenly_and_anew_in_every_pass(small: SplitIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[int, list[int]] = {}
    read_batch = ShardReader.read_batch

    def watch(self: ShardReader, split: SplitIndex, rows: Any, slots: Any) -> list[bytes]:
        for row, slot in zip(rows, slots, strict=True):
            chosen.setdefault(int(row), []).append(int(split.camids[row]) if slot == 3 else slot)
        return read_batch(self, split, rows, slots)

    monkeypatch.setattr(ShardReader, "read_batch", watch)
    batches(small, last_step=4 * 30)
    counts = np.bincount(np.concatenate(list(chosen.values())), minlength=3)
    assert np.abs(counts / counts.sum() * 3 - 1).max() < 0.15
    assert all(len(set(cameras)) == 3 for cameras in chosen.values())
    chosen.clear()
    batches(small, style="real")
    assert all(set(cameras) == {small.camids[row]} for row, cameras in chosen.items())


def test_erasing_alone_tells_streams_with_and_without_it_apart(small: SplitIndex) -> None:
    fill = torch.tensor(transforms.ECN.erase_fill).view(3, 1, 1)
    never, always = (batches(small, augmentation=Augmentation("ecn", probability)) for probability in (0.0, 1.0))
    for this, that in zip(never, always, strict=True):
        assert torch.equal(this.indices, that.indices)
        erased = (that.images == fill).all(dim=1, keepdim=True)
        assert erased.flatten(1).any(dim=1).all()
        assert not (this.images == fill).all(dim=1).any()
        assert torch.equal(this.images.where(~erased, that.images), that.images)


def bytes_of(split: SplitIndex, first_step: int, last_step: int) -> int:
    """What these steps read, as the operating system counts it."""

    def counted() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    batches(split, last_step=1)  # what is only read once: modules, the members' pages
    own = counted() - counted()  # the counting itself
    stream = train_stream(split)
    before = counted()
    list(stream.batches(first_step, last_step))
    return counted() - before + own


def test_a_pass_reads_the_chosen_pictures_and_nothing_else(split: SplitIndex) -> None:
    row_of = {int(index): row for row, index in enumerate(split.indices)}
    draws = Draws(1, "target", "augmentation")

    def chosen_bytes(first_step: int, last_step: int) -> int:
        total = 0
        for step, batch in enumerate(batches(split, first_step, last_step), first_step):
            for index, camid in zip(batch.indices.tolist(), batch.camids.tolist(), strict=True):
                camera = int(transforms.draw_camera(draws.uniforms(1, (0, index, step // 4))[0, 0], 3))
                total += int(split.members["length"][row_of[index]][3 if camera == camid else camera])
        return total

    for first_step in (0, 3):  # from the start, and after a resume
        read, chosen = bytes_of(split, first_step, 8), chosen_bytes(first_step, 8)
        assert chosen <= read <= 1.05 * chosen


def test_labels_are_for_the_source_alone(small: SplitIndex) -> None:
    for batch in batches(small, domain="source", style="real"):
        # write_split names identity n 10 n, and lists them from the last to the first.
        assert (batch.labels == 4 - batch.pids // 10).all()
    for batch in batches(small):
        assert (batch.labels == NO_LABEL).all()


def test_a_source_of_unknown_people_and_styles_that_were_not_packed_are_refused(tmp_path: Path) -> None:
    split = write_split(tmp_path, [30], styles=False)
    with pytest.raises(UserError, match=r"lacks 60 style copies.*--camera_style histogram"):
        train_stream(split)
    members = np.array(split.members)
    members["pid"][7] = -1
    unknown = SplitIndex("train", split.folder, split.shards, members, 3, split.identities)
    train_stream(unknown, style="real")
    with pytest.raises(UserError, match="have no identity"):
        train_stream(unknown, style="real", domain="source")


def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(small: SplitIndex) -> None:
    with pytest.raises(UserError, match="these would do: 5, 10"):
        train_stream(small, global_batch_size=10, streams=2, world_size=5)
    with pytest.raises(UserError, match="fewer than one batch of 60"):
        train_stream(small, global_batch_size=60)


def evaluated(split: SplitIndex, world_size: int, **options: Any) -> list[Batch]:
    """All ranks' batches, rank by rank, without the exchange at the end that needs a process group."""
    batches = []
    for rank in range(world_size):
        stream = EvaluationStream(split, height=40, width=20, batch_size=7, rank=rank, world_size=world_size, **options)
        steps = [batch for _, batch in stream._loader.batches(lambda steps=stream._steps: steps)]
        assert len(steps) == len(stream)
        batches += steps
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 60])
def test_evaluation_sees_each_picture_once_in_stored_order(split: SplitIndex, world_size: int) -> None:
    batches = evaluated(split, world_size)
    assert torch.cat([batch.indices for batch in batches]).tolist() == split.indices.tolist()
    assert torch.cat([batch.pids for batch in batches]).tolist() == split.pids.tolist()
    assert torch.cat([batch.camids for batch in batches]).tolist() == split.camids.tolist()
    images = torch.cat([batch.images for batch in batches])
    for row in (0, 17, 49):
        expected = prepare_picture(ShardReader().read_picture(split, row), 40, 20)
        assert (images[row] - expected).abs().max() < 2.02 / 255 / 0.224


def test_evaluation_does_not_depend_on_workers(small: SplitIndex) -> None:
    for one, other in zip(evaluated(small, 2), evaluated(small, 2, workers=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)


def test_evaluation_keeps_its_workers_where_it_is_told_to(small: SplitIndex) -> None:
    options: Any = {"height": 40, "width": 20, "batch_size": 7, "workers": 2}
    expected = [batch.images for batch in EvaluationStream(small, **options)]
    kept, left = EvaluationStream(small, keep_workers=True, **options), set[int | None]()
    for _ in range(3):
        assert all(map(torch.equal, (batch.images for batch in kept), expected))
        next(iter(kept))  # one that is left begins no others
        left |= {worker.pid for worker in loader_workers()}
    assert len(left) == 2
    kept.close()
    assert within(5, lambda: not loader_workers())
    assert len([batch.images for batch in kept]) == len(expected)
    kept.close()


@pytest.fixture
def served(
    small: SplitIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FolderServer, SplitIndex]]:
    """`small` behind a URL."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    server = FolderServer(Path(small.folder))
    yield server, SplitIndex("train", server.url, small.shards, np.array(small.members), 3, small.identities)
    server.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_behind_a_url_give_the_same_batches_and_are_fetched_once(
    served: tuple[FolderServer, SplitIndex], small: SplitIndex, workers: int
) -> None:
    server, remote = served
    assert_equal(globally(remote, 2, workers=workers), globally(small, 2))
    assert server.requests == {shard.name: 1 for shard in small.shards}
    evaluation = EvaluationStream(remote, height=40, width=20, batch_size=7, workers=workers)
    assert torch.cat([batch.indices for batch in evaluation]).tolist() == small.indices.tolist()
    assert sum(server.requests.values()) == 3


def test_what_workers_get_is_small(served: tuple[FolderServer, SplitIndex], small: SplitIndex) -> None:
    for split in (small, served[1]):
        stream = train_stream(split, workers=1)
        list(stream.batches(0, 1))
        assert b".members.npy" in (pickled := pickle.dumps(dataset_of(stream)))
        assert len(pickled) < 12_000  # the rows themselves are in a file that a worker maps


def test_shards_are_fetched_ahead_of_use(
    served: tuple[FolderServer, SplitIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, remote = served
    # One stream without shuffling over shards: the first batch needs one or two of the three.
    monkeypatch.setattr("ecn_dist.data.plan.SHARDS_PER_WINDOW", 0)
    stream = train_stream(remote, streams=1, window=1)
    later = {int(remote.members["shard"][row]) for step in range(1, 4) for row in stream.plan.step(step).rows_b} - {
        int(remote.members["shard"][row]) for row in stream.plan.step(0).rows_b
    }
    assert later
    iterator = stream.batches(0, 9)
    next(iterator)
    assert all(server.wait_for(remote.shards[shard].name) for shard in later)


def test_a_cache_too_small_for_two_shards_is_refused(
    served: tuple[FolderServer, SplitIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GIB_VARIABLE, "0.00001")
    with pytest.raises(UserError, match=r"limited to 10737 bytes, and shards are up to \d+ bytes large: raise ECN_"):
        next(train_stream(served[1]).batches(0, 1))
