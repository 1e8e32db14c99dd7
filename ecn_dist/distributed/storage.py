"""Tensors of all ranks in one folder of safetensors files, some of them sharded over rows.

By torch.distributed.checkpoint, with its safetensors format: every rank writes its part to a file of its own, any
number of ranks can read them, and nothing in them is pickled.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ecn_dist.distributed.process_group import world_size


def as_row_sharded(rows: Tensor, num_rows: int) -> Tensor:
    """This rank's part (n, ...) of a tensor of `num_rows` rows, cut as `RowPartition`, as a DTensor over all ranks.

    Shares its memory with `rows`, so loading into it fills `rows`. On one process it is `rows` itself.
    """
    if world_size() == 1:
        return rows
    mesh = init_device_mesh(rows.device.type, (world_size(),))
    shape = torch.Size((num_rows, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def save_sharded(state: dict[str, Tensor], folder: Path) -> None:
    """Write tensors into `folder`, every rank its part; a tensor that all ranks hold is written once. Collective."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(_without_scalars(state), storage_writer=writer, no_dist=world_size() == 1)


def load_sharded(state: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors of `state` in place from `folder`, whatever number of ranks wrote it. Collective."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(_without_scalars(state), storage_reader=reader, no_dist=world_size() == 1)


def _without_scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # The reader slices what it loads, and a 0-dimensional tensor cannot be sliced. A view shares its memory.
    return {key: tensor.view(1) if tensor.dim() == 0 else tensor for key, tensor in state.items()}
