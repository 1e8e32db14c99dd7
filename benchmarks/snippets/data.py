"""A pass over a shard folder's training split, named in SHARDS. For `python -m benchmarks compare`."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch

from ecn_dist.data.index import ShardIndex
from ecn_dist.data.stream import TrainStream

torch.set_num_threads(1)
split = ShardIndex.load(os.environ["SHARDS"]).split("train")
BATCH = 60


def batches() -> Iterable[Any]:
    """Of either version: streams of 0.1 made their plan themselves."""
    steps = len(split) // BATCH
    size = {"height": 256, "width": 128}
    if "plan" in inspect.signature(TrainStream).parameters:
        from ecn_dist.data.plan import PassPlan

        plan = PassPlan([shard.samples for shard in split.shards], BATCH, 1, 0, "target")
        return TrainStream(split, plan, **size).batches(0, steps)  # type: ignore[arg-type]
    options = {"global_batch_size": BATCH, "streams": 1, "seed": 0, "domain": "target", "random_erasing": 0.5}
    stream: Any = TrainStream
    return stream(split, **options, **size, camera_style=False, first_step=0, last_step=steps)


def run() -> None:
    for batch in batches():
        assert len(batch.images) == BATCH
