"""A pass over a shard folder's training split, named in SHARDS. For `python -m benchmarks compare`."""

import os

import torch

from ecn_dist.data.index import ShardIndex
from ecn_dist.data.stream import TrainStream

torch.set_num_threads(1)
split = ShardIndex.load(os.environ["SHARDS"]).split("train")
BATCH = 60


def run() -> None:
    stream = TrainStream(
        split, global_batch_size=BATCH, streams=1, seed=0, domain="target", height=256, width=128, random_erasing=0.5,
        camera_style=False, first_step=0, last_step=len(split) // BATCH,
    )  # fmt: skip
    for batch in stream:
        assert len(batch.images) == BATCH
