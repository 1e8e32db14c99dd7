"""Tensors of all ranks in a folder of safetensors files, some sharded over rows, by torch.distributed.checkpoint."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from ecn_dist.distributed.collectives import together
from ecn_dist.distributed.liveness import entering
from ecn_dist.distributed.process_group import world_size
from ecn_dist.errors import UserError


@dataclass(frozen=True)
class RowPartition:
    """N rows in W contiguous parts of ceil(N / W); the last parts may be shorter, or empty.

    `torch.chunk` and DTensor's `Shard(0)` cut alike, so any number of ranks can read a checkpoint.
    """

    num_rows: int
    world_size: int

    @property
    def rows_per_rank(self) -> int:
        return -(-self.num_rows // self.world_size)

    def start(self, rank: int) -> int:
        """The first row of `rank`."""
        return min(rank * self.rows_per_rank, self.num_rows)

    def stop(self, rank: int) -> int:
        """One past the last row of `rank`."""
        return min((rank + 1) * self.rows_per_rank, self.num_rows)

    def size(self, rank: int) -> int:
        """How many rows `rank` owns."""
        return self.stop(rank) - self.start(rank)


def as_row_sharded(rows: Tensor, num_rows: int) -> Tensor:
    """This rank's (n, ...) of `num_rows` rows, cut as `RowPartition`, as a DTensor of its memory; `rows`, if alone."""
    if world_size() == 1:
        return rows
    mesh = init_device_mesh(rows.device.type, (world_size(),))
    shape = torch.Size((num_rows, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of what `as_row_sharded` gave."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PendingSave(dcp.HuggingFaceStorageWriter):
    """This rank's part of a folder of tensors, copied to the host and not yet written.

    `dcp.save` does what needs all ranks, and leaves what needs none, the writing, for later.
    """

    def __init__(self, state: dict[str, Tensor], folder: Path) -> None:
        """Agree on who writes what (one rank, what all hold), and copy this rank's part. Collective."""
        super().__init__(str(folder), save_distributed=True)
        with _of_all_ranks("checkpoint save"):
            dcp.save(_without_scalars(state), storage_writer=self, no_dist=world_size() == 1)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list]:
        """For `dcp.save`: copies what is to be written, and returns nothing written."""
        self._plan = plan
        self._copies: dict[MetadataIndex, Tensor] = {
            item.index: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
            for item in plan.items
            if isinstance(tensor := planner.resolve_data(item), Tensor)
        }
        nothing: Future[list] = Future()
        nothing.set_result([])
        return nothing

    def write(self) -> dict[str, tuple[int, str]]:
        """Write the part into the folder, which must exist, in any thread: size and sha256 of each file by name."""
        self.per_thread_copy_ahead = 0  # there is nothing to copy from an accelerator any more
        copies: Any = SimpleNamespace(resolve_data=lambda item: self._copies[item.index])
        names = {result.storage_data.relative_path for result in super().write_data(self._plan, copies).wait()}
        paths = [Path(self.path, name) for name in names]
        return {path.name: (path.stat().st_size, checksum(path)) for path in paths}


def checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_sharded(state: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors of `state` in place from `folder`, whatever number of ranks wrote it. Collective.

    Raises `UserError`, on all ranks, for tensors that the folder lacks or has in another shape, and for damaged files.
    """
    reader = together(lambda: _open(folder))
    wanted, stored = _without_scalars(state), reader.metadata.state_dict_metadata
    problems = [f"{key} is missing" for key in wanted if key not in stored]
    for key, tensor in wanted.items():
        about = stored.get(key)
        if not isinstance(about, TensorStorageMetadata):
            continue
        # Of what a header says, `size` has as many dimensions as its own metadata tell, and a part as its tensor.
        sizes = (about.size, *(part.sizes for part in about.chunks if len(part.sizes) != tensor.dim()))
        if wrong := [size for size in sizes if size != tensor.shape]:
            problems.append(f"{key} is {tuple(wrong[0])} and not {tuple(tensor.shape)}")
        if not _holds(about.properties.dtype, tensor.dtype):
            problems.append(f"{key} is of {about.properties.dtype} and not {tensor.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        found = f"{', '.join(problems[:5])}{more}; it comes from another network or data set"
        raise UserError(f"{folder} does not fit: {found}", on_all_ranks=True)
    with _of_all_ranks("checkpoint load"):
        dcp.load(wanted, storage_reader=reader, no_dist=world_size() == 1)


def _holds(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values mean the same in both: floating point of any precision that is trained with, or equal types."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point and stored.itemsize > 1)


@contextmanager
def _of_all_ranks(what: str) -> Iterator[None]:
    """Raise what torch raises on all ranks, of any rank, as an ordinary exception."""
    entering(what)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on one process: it should be
            yield
    except CheckpointException as error:
        failures = {rank: cause for rank, (cause, _) in error.failures.items() if isinstance(cause, OSError)}
        if failures:
            problems = "; ".join(f"rank {rank}: {cause}" for rank, cause in failures.items())
            raise UserError(f"{what} failed on {problems}", on_all_ranks=True) from error
        raise RuntimeError(f"{what} failed: {error}") from error


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the headers of the files once."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self.metadata


def _open(folder: Path) -> _Reader:
    try:
        return _Reader(str(folder))
    except OSError:
        raise
    except Exception as damage:  # torch takes what the headers say as it is
        remedy = f"bring the file back, or remove the checkpoint {folder.name}, so that one before it is taken"
        for path in sorted(folder.glob("*.safetensors")):
            try:
                safe_open(path, "pt")
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}): {remedy}") from error
        raise UserError(f"{folder} has a damaged file ({type(damage).__name__}: {damage}): {remedy}") from damage


def _without_scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # The reader slices what it loads, and a 0-dimensional tensor cannot be sliced. A view shares its memory.
    return {key: tensor.view(1) if tensor.dim() == 0 else tensor for key, tensor in state.items()}
