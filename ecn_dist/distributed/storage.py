"""Tensors of all ranks in one folder of safetensors files, some of them sharded over rows.

By torch.distributed.checkpoint: every rank writes its part to a file of its own, and any number of ranks can read them.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from ecn_dist.distributed.position import entering
from ecn_dist.distributed.process_group import world_size
from ecn_dist.errors import UserError


def as_row_sharded(rows: Tensor, num_rows: int) -> Tensor:
    """This rank's part (n, ...) of `num_rows` rows, cut as `RowPartition`, as a DTensor that shares its memory.

    On one process it is `rows` itself.
    """
    if world_size() == 1:
        return rows
    mesh = init_device_mesh(rows.device.type, (world_size(),))
    shape = torch.Size((num_rows, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of what `as_row_sharded` gave."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PendingSave:
    """This rank's part of a folder of tensors, copied to the host and not yet written."""

    def __init__(self, state: dict[str, Tensor], folder: Path) -> None:
        """Agree on who writes what (one rank, what all hold), and copy this rank's part. Collective."""
        self._folder = folder
        self._writer = _PlanningWriter(str(folder), save_distributed=True)
        with _of_all_ranks("checkpoint save"):
            dcp.save(_without_scalars(state), storage_writer=self._writer, no_dist=world_size() == 1)
        self._part = _HostCopy(self._writer.plan, self._writer.planner)

    def write(self) -> dict[str, int]:
        """Write the part into the folder, which must exist: file names and sizes in bytes. Good for any thread.

        Raises:
            OSError: Where the folder cannot be written.
        """
        results = self._writer.write_now(self._part)
        return {name: (self._folder / name).stat().st_size for name in {r.storage_data.relative_path for r in results}}


class _PlanningWriter(dcp.HuggingFaceStorageWriter):
    """Lets `dcp.save` do what needs all ranks, and leaves what needs none, the writing, for later."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list]:
        self.plan, self.planner = plan, planner
        nothing: Future[list] = Future()
        nothing.set_result([])
        return nothing

    def write_now(self, part: "_HostCopy") -> list:
        self.per_thread_copy_ahead = 0  # there is nothing to copy from an accelerator any more
        return super().write_data(part.plan, part).wait()


class _HostCopy(dcp.DefaultSavePlanner):
    """Hands out copies on the host of what a plan writes."""

    def __init__(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> None:
        super().__init__()
        self.plan = plan
        self._tensors: dict[MetadataIndex, Tensor] = {
            item.index: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
            for item in plan.items
            if isinstance(tensor := planner.resolve_data(item), Tensor)
        }

    def resolve_data(self, write_item: Any) -> Tensor:
        return self._tensors[write_item.index]


def checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_sharded(state: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors of `state` in place from `folder`, whatever number of ranks wrote it. Collective.

    Raises:
        UserError: On all ranks, for tensors that the folder lacks or has in another shape, and for damaged files.
    """
    reader = together(lambda: _open(folder))
    wanted = _without_scalars(state)
    stored = reader.metadata.state_dict_metadata
    problems = [f"{key} is missing" for key in wanted if key not in stored]
    for key, tensor in wanted.items():
        about = stored.get(key)
        if isinstance(about, TensorStorageMetadata):
            # Of what a header says, `size` has as many dimensions as its own metadata tell, and a part as its tensor.
            parts = (part.sizes for part in about.chunks if len(part.sizes) != tensor.dim())
            found = about.size if about.size != tensor.shape else next(parts, tensor.shape)
            if found != tensor.shape:
                problems.append(f"{key} is {tuple(found)} and not {tuple(tensor.shape)}")
            if not _holds(about.properties.dtype, tensor.dtype):
                problems.append(f"{key} is of {about.properties.dtype} and not {tensor.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{folder} does not fit: {', '.join(problems[:5])}{more}; it comes from another network or data set",
            on_all_ranks=True,
        )
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


def _open(folder: Path) -> "_Reader":
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


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the headers of the files once."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self.metadata


def _without_scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # The reader slices what it loads, and a 0-dimensional tensor cannot be sliced. A view shares its memory.
    return {key: tensor.view(1) if tensor.dim() == 0 else tensor for key, tensor in state.items()}
