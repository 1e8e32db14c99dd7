"""Streams on real ranks: the union is what one rank sees, and bad data on one is an error on all."""

import os
from pathlib import Path

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.loader import Batch
from ecn_dist.data.reader import check_shards
from ecn_dist.data.stream import EvaluationStream
from ecn_dist.errors import UserError
from tests.tiny_shards import write_split
from tests.unit.data.test_reader import overwrite
from tests.unit.data.test_stream import batches, train_stream


def gather(own: list[Batch]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The global batches' images and indices, on every rank."""
    images = [distributed.all_gather_rows(batch.images) for batch in own]
    return images, [distributed.all_gather_rows(batch.indices) for batch in own]


def check_union(split: SplitIndex) -> None:
    alone = batches(split)
    own = batches(split, rank=distributed.rank(), world_size=distributed.world_size())
    images, indices = gather(own)
    for step, batch in enumerate(alone):
        assert torch.equal(images[step], batch.images)
        assert torch.equal(indices[step], batch.indices)


def check_training_error(split: SplitIndex) -> int:
    """As a trainer does: one flag in an exchange of every step. Returns the step at which this rank raised."""
    stream = train_stream(split, rank=distributed.rank(), world_size=distributed.world_size())
    for step, batch in enumerate(stream.batches(0, 9)):
        if distributed.any_rank(batch.error is not None):
            with pytest.raises(UserError, match="cannot be decoded") as caught:
                distributed.raise_together(batch.error)
            assert caught.value.on_all_ranks
            return step
    raise AssertionError("no error")


def check_replacement(split: SplitIndex) -> None:
    options = {"max_bad_samples": 3}
    alone = batches(split, **options)
    stream = train_stream(split, rank=distributed.rank(), world_size=distributed.world_size(), **options)
    own = list(stream.batches(0, 9))
    images, _ = gather(own)
    for step, batch in enumerate(alone):
        assert torch.equal(images[step], batch.images)
        assert distributed.all_reduce(torch.tensor(own[step].skipped)) == batch.skipped
    assert any(batch.skipped for batch in alone)


def check_evaluation(split: SplitIndex) -> None:
    options = {"height": 32, "width": 16, "batch_size": 4}
    alone = torch.cat([batch.images for batch in EvaluationStream(split, **options)])
    rank, world_size = distributed.rank(), distributed.world_size()
    stream = EvaluationStream(split, rank=rank, world_size=world_size, **options)
    own = torch.cat([torch.empty(0, 3, 32, 16), *(batch.images for batch in stream)])
    part = distributed.RowPartition(len(split), world_size)
    assert torch.equal(own, alone[part.start(rank) : part.stop(rank)])


def check_evaluation_error(split: SplitIndex) -> None:
    options = {"height": 32, "width": 16, "batch_size": 4}
    stream = EvaluationStream(split, rank=distributed.rank(), world_size=distributed.world_size(), **options)
    with pytest.raises(UserError, match="cannot be decoded"):
        list(stream)


def check_size_check(split: SplitIndex, lost_on_rank: int) -> None:
    """A folder that one host has in full and another has not, as copies on local disks may be."""
    if distributed.rank() == lost_on_rank:
        split = SplitIndex("train", f"{split.folder}/gone", split.shards, split.members, 3, split.identities)
    with pytest.raises(UserError, match=r"3 shards are missing(?s:.*)train-000000.tar: No such file") as caught:
        distributed.together(lambda: check_shards(split))
    assert caught.value.on_all_ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree(ranks, world_size: int, tmp_path: Path) -> None:
    split = write_split(tmp_path, [20, 10, 20])
    ranks(world_size).run(check_union, split)
    ranks(world_size).run(check_evaluation, split)
    ranks(world_size).run(check_size_check, split, world_size - 1)
    stream = train_stream(split)
    for slot in range(4):
        row = int(stream.plan.step(2).rows_b[0])
        if split.members["length"][row][slot]:
            overwrite(split, row, slot, b"\0" * 50)
    assert ranks(world_size).run(check_training_error, split) == [2] * world_size
    ranks(world_size).run(check_replacement, split)
    ranks(world_size).run(check_evaluation_error, split)
    os.truncate(split.shard_path(1), 100)
    with pytest.raises(UserError, match=r"1 shards are missing or not what was packed"):
        check_shards(split)
