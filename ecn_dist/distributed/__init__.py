"""The only home of torch.distributed: process group, collectives, row partition.

Every function works without a process group: there is then one rank, and a collective is the identity.
"""

from ecn_dist.distributed.collectives import (
    all_gather_rows,
    all_gather_uneven_rows,
    all_ranks,
    all_reduce,
    any_rank,
    barrier,
    broadcast_object,
    count_traffic,
    gather_objects,
    raise_together,
    reduce_scatter_rows,
)
from ecn_dist.distributed.partition import RowPartition
from ecn_dist.distributed.process_group import (
    end,
    is_distributed,
    is_main,
    local_rank,
    rank,
    resolve_device,
    start,
    world_size,
)

__all__ = [
    "RowPartition",
    "all_gather_rows",
    "all_gather_uneven_rows",
    "all_ranks",
    "all_reduce",
    "any_rank",
    "barrier",
    "broadcast_object",
    "count_traffic",
    "end",
    "gather_objects",
    "is_distributed",
    "is_main",
    "local_rank",
    "raise_together",
    "rank",
    "reduce_scatter_rows",
    "resolve_device",
    "start",
    "world_size",
]
