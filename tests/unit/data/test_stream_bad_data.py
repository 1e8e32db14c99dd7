"""Bad data: a batch that says so, or a replacement that does not depend on ranks; never a batch less."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ecn_dist.data.index import SplitIndex
from ecn_dist.data.loader import Batch
from ecn_dist.data.stream import EvaluationStream, TrainStream
from ecn_dist.errors import UserError
from tests.tiny_shards import write_split
from tests.unit.data.test_reader import overwrite
from tests.unit.data.test_stream import assert_equal, batches, globally, train_stream


@pytest.fixture
def split(tmp_path: Path) -> SplitIndex:
    return write_split(tmp_path, [20, 10, 20])


def damage(split: SplitIndex, row: int, slots: Iterable[int] = range(4)) -> None:
    for slot in slots:
        if split.members["length"][row][slot]:
            overwrite(split, row, slot, b"\0" * 50)


def until_error(stream: TrainStream | EvaluationStream, last_step: int = 9) -> tuple[list[Batch], str]:
    batches = []
    try:
        for batch in stream.batches(0, last_step) if isinstance(stream, TrainStream) else stream:
            batches.append(batch)
    except UserError as error:
        return batches, str(error)
    raise AssertionError("no error")


def plan_of(split: SplitIndex, step: int, rank: int = 0, world_size: int = 1, **options: Any) -> list[int]:
    stream = train_stream(split, **options)
    return stream.plan.step(step, rank, world_size).rows_b.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_an_error_in_the_batch_it_belongs_to(
    split: SplitIndex, workers: int
) -> None:
    row = plan_of(split, 2)[7]
    damage(split, row)
    key = f"{split.indices[row]:06d}"
    assert batches(split, rank=0, world_size=2, last_step=4, workers=workers)[2].error is None
    made, error = until_error(train_stream(split, rank=1, world_size=2, workers=workers))
    assert [batch.error is None for batch in made] == [True, True, False]
    assert made[-1].error == error
    assert Path(split.shard_path(int(split.members["shard"][row]))).name in error
    assert key in error
    assert "--data.max_bad_samples" in error
    # In full shape, so that a rank may still take part in the collectives of the step.
    assert made[-1].images.shape == (6, 3, 32, 16)
    assert made[-1].indices.shape == (6,)


@pytest.mark.parametrize("damaged", [[0], [3, 4], [49], [48, 49, 0]])
def test_replaced_pictures_keep_all_ranks_in_step(split: SplitIndex, damaged: list[int]) -> None:
    before = globally(split, 1)
    for row in damaged:
        damage(split, row)
    after = globally(split, 1, max_bad_samples=len(damaged))
    stored = split.indices.tolist()

    def replaced(index: int) -> int:
        row = stored.index(index)
        while row in damaged:
            row = (row + 1) % 50
        return stored[row]

    for this, that in zip(before, after, strict=True):
        assert [replaced(index) for index in this["indices"].tolist()] == that["indices"].tolist()
        same = this["indices"] == that["indices"]
        assert torch.equal(this["images"][same], that["images"][same])
    for world_size in (2, 3):
        assert_equal(globally(split, world_size, max_bad_samples=len(damaged)), after)
    pids = {int(index): int(pid) for index, pid in zip(split.indices, split.pids, strict=True)}
    assert all(pids[int(i)] == p for batch in after for i, p in zip(batch["indices"], batch["pids"], strict=True))


def test_replaced_pictures_are_counted_and_limited_by_pass(split: SplitIndex, caplog: pytest.LogCaptureFixture) -> None:
    rows = [plan_of(split, step)[0] for step in (0, 1, 2)]
    for row in rows:
        damage(split, row)
    made = batches(split, max_bad_samples=3, last_step=8)
    assert [batch.skipped for batch in made[:4]] == [1, 1, 1, 0]
    assert sum(batch.skipped for batch in made[4:]) <= 3  # fewer where one is left out
    assert caplog.messages[0] == "target: 3 pictures of this pass could not be decoded and were replaced"
    made, error = until_error(train_stream(split, max_bad_samples=2), last_step=8)
    assert [batch.error is None for batch in made] == [True, True, False]
    assert "3 pictures in this pass cannot be decoded, more than data.max_bad_samples (2)" in error


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (3, 0)])
def test_every_rank_tells_its_replaced_pictures_by_step(split: SplitIndex, world_size: int, workers: int) -> None:
    damaged = {plan_of(split, step)[place] for step, place in ((0, 0), (0, 11), (2, 5))}
    for row in damaged:
        damage(split, row)
    in_step = [0] * 9
    for rank in range(world_size):
        options: dict[str, Any] = {"rank": rank, "world_size": world_size}
        expected = [len(damaged.intersection(plan_of(split, step, **options))) for step in range(9)]
        stream = train_stream(split, max_bad_samples=3, workers=workers, **options)
        for step, batch in enumerate(stream.batches(0, 9)):
            assert type(batch.skipped) is int
            assert batch.skipped == expected[step]
            in_step[step] += batch.skipped
    assert in_step[:4] == [2, 0, 1, 0]


@pytest.mark.parametrize("left", ["at its end", "closed", "dropped", "by an error"])
def test_what_was_replaced_in_a_pass_that_does_not_end_is_told(
    split: SplitIndex, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    damage(split, plan_of(split, 0)[3])
    stream = train_stream(split, max_bad_samples=3)
    made = stream.batches(0, 3)
    next(made)
    assert caplog.messages == []
    if left == "at its end":
        list(made)
    elif left == "closed":
        made.close()
    elif left == "dropped":
        del made
    else:
        for shard in range(3):
            os.truncate(split.shard_path(shard), 0)
        with pytest.raises(UserError, match="ends within"):
            list(made)
    assert caplog.messages == ["target: 1 pictures of this pass could not be decoded and were replaced"]


def test_where_nothing_near_can_be_decoded_there_is_no_replacement(split: SplitIndex) -> None:
    for row in range(50):
        damage(split, row)
    made, error = until_error(train_stream(split, max_bad_samples=100))
    assert len(made) == 1
    assert "cannot be decoded" in error


@pytest.mark.parametrize("max_bad_samples", [0, 100])
def test_a_shard_that_was_cut_or_is_gone_is_never_replaced(split: SplitIndex, max_bad_samples: int) -> None:
    os.truncate(split.shard_path(1), 1000)
    _, error = until_error(train_stream(split, max_bad_samples=max_bad_samples))
    assert "train-000001.tar ends within the picture" in error
    os.unlink(split.shard_path(1))
    _, error = until_error(train_stream(split, max_bad_samples=max_bad_samples))
    assert "train-000001.tar cannot be read (No such file" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_without_no_picture(split: SplitIndex, workers: int) -> None:
    damage(split, 30)
    made, error = until_error(EvaluationStream(split, height=32, width=16, batch_size=8, workers=workers))
    assert f"train-000002.tar: {split.indices[30]:08d}.jpg" in error
    assert len(made) == 3
