"""What training reads: the shard index, plans, streams of batches, transforms, shards behind URLs."""

# ruff: noqa: F401 - what is imported here is what others use

from ecn_dist.data.identity_plan import IdentityPlan
from ecn_dist.data.index import ShardIndex, SplitIndex
from ecn_dist.data.loader import Batch
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.stream import EvaluationStream, TrainStream
from ecn_dist.data.transforms import Augmentation
