"""Records, packing, the shard index, planned streams, transforms, camera style, synthetic domains."""

from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.data.stream import Batch, EvaluationStream, TrainStream

__all__ = ["Batch", "EvaluationStream", "ShardIndex", "SplitIndex", "TrainStream"]
