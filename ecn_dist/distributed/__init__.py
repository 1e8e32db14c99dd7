"""The only home of torch.distributed: process group, collectives, row partition.

Every function works without a process group: there is then one rank, and a collective is the identity.
"""

# ruff: noqa: F401 - what is imported here is what others use

from ecn_dist.distributed.collectives import (
    PendingRows,
    all_gather_rows,
    all_gather_uneven_rows,
    all_reduce,
    any_rank,
    any_rank_of,
    barrier,
    broadcast_object,
    count_traffic,
    exchange_rows,
    gather_objects,
    on_main,
    raise_together,
    reduce_scatter_rows,
    start_all_gather_rows,
    together,
)
from ecn_dist.distributed.liveness import EXIT_RANK_LOST, at_step, entering
from ecn_dist.distributed.process_group import (
    end,
    is_distributed,
    is_main,
    keep_freed_memory,
    rank,
    report_failure,
    resolve_device,
    start,
    world_size,
)
from ecn_dist.distributed.storage import PendingSave, RowPartition, as_row_sharded, checksum, load_sharded, own_part
