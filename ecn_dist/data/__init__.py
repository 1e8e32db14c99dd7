"""What training reads: the shard index, plans, streams of batches, transforms, shards behind URLs."""

from ecn_dist.data.identity_plan import IdentityPlan
from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.data.plan import PassPlan, Plan, check_batch
from ecn_dist.data.stream import Batch, EvaluationStream, TrainStream
from ecn_dist.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "Batch",
    "EvaluationStream",
    "IdentityPlan",
    "PassPlan",
    "Plan",
    "ShardIndex",
    "SplitIndex",
    "TrainStream",
    "check_batch",
]
