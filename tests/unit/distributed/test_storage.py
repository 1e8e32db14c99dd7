"""RowPartition against torch.chunk, whose cut DTensor uses."""

import pytest
import torch

from ecn_dist.distributed import RowPartition


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12, 13])
def test_cut_is_that_of_torch_chunk(num_rows: int, world_size: int) -> None:
    partition = RowPartition(num_rows, world_size)
    chunks = [chunk.tolist() for chunk in torch.arange(num_rows).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    for rank, rows in enumerate(chunks):
        assert list(range(partition.start(rank), partition.stop(rank))) == rows
        assert partition.size(rank) == len(rows)
