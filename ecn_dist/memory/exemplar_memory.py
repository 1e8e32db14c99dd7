"""The exemplar memory: one row for each target training image, the rows divided among the ranks.

Shape letters: b batch rows here, B on all ranks, M memory rows here, N in all, D feature length, k neighbours.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError
from ecn_dist.memory.batch import GatheredBatch
from ecn_dist.memory.losses import BatchDiagnostics
from ecn_dist.memory.rows_pass import RowsSummary, default_chunk_bytes, summarize_rows

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ExemplarMemory:
    """N rows of length D, rank r holding the contiguous part `partition.start(r)` to `partition.stop(r)`.

    A row stands for a target training image, or for whatever a method makes classes of: clusters, proxies. It starts
    at zero. Sums are in float32 at least. Working memory above the rows is a chunk and a few times (B, D), whatever N.
    Works with or without a process group, which must be up before. A step is

        batch = memory.gather(features, indices)    # begins the transfer
        batch.loss(num_neighbors).backward()
        batch.update(momentum)                      # after the optimiser's step

    Args:
        num_exemplars: N.
        dim: D.
        temperature: The beta of the softmax.
        device: Where the rows are.
        dtype: Of the rows: float32, bfloat16, float16, or float64 for tests.
        chunk_bytes: What a chunk of the pass touches, about; None: what suits the device.
        backend: "triton" takes `rows_pass_triton` (half-precision rows on an accelerator, D a multiple of 64).

    Attributes:
        rows: This rank's (M, D) tensor.
        written: (M,) the number of the update that wrote a row last, -1 for none.
    """

    def __init__(
        self,
        num_exemplars: int,
        dim: int,
        temperature: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        chunk_bytes: int | None = None,
        backend: Literal["torch", "triton"] = "torch",
    ) -> None:
        if num_exemplars < 1 or dim < 1:
            raise UserError(f"memory: {num_exemplars} exemplars of length {dim}; both must be at least 1")
        if not temperature > 0:
            raise UserError(f"memory.temperature: {temperature} must be above 0 (the paper's is 0.05)")
        if dtype not in ROW_DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in ROW_DTYPES)
            raise UserError(f"memory: rows cannot be {str(dtype).removeprefix('torch.')}; use one of {names}")
        self.num_exemplars, self.dim, self.temperature = num_exemplars, dim, temperature
        self.partition = RowPartition(num_exemplars, distributed.world_size())
        self.first_row = self.partition.start(distributed.rank())
        num_rows = self.partition.size(distributed.rank())
        self.rows = torch.zeros(num_rows, dim, device=device, dtype=dtype)
        self.chunk_bytes = chunk_bytes or default_chunk_bytes(self.rows.device)
        self._summarize_rows = _backend(backend, self.rows)
        self.written = torch.full((num_rows,), -1, device=self.rows.device)
        self.num_updates = 0
        self.refused = torch.zeros(2, dtype=torch.int64, device=self.rows.device)  # steps: skipped, not finite
        self.set_identities(None)
        self.latest: BatchDiagnostics | None = None  # of the latest loss

    def gather(self, features: Tensor, indices: Tensor) -> GatheredBatch:
        """Begin to bring the batch parts of all ranks together; what is done before the loss hides the transfer.

        `features` are (b, D) of any floating type, equal b on all ranks; the loss is differentiable in them. `indices`
        are (b,) int64, the global numbers of the pictures' rows. Raises `UserError` for shapes that do not fit.
        Collective: two all-gathers.
        """
        return GatheredBatch(self, features, indices)

    def loss(self, features: Tensor, indices: Tensor, num_neighbors: int = 0) -> Tensor:
        """`gather` and `GatheredBatch.loss`, in one."""
        return self.gather(features, indices).loss(num_neighbors)

    def update(self, features: Tensor, indices: Tensor, momentum: float, skip: bool | Tensor = False) -> None:
        """`gather` and `GatheredBatch.update`, in one, for the rows given to `loss`."""
        self.gather(features, indices).update(momentum, skip)

    def summarize(
        self, features_BD: Tensor, num_neighbors: int, *, left_out: tuple[Tensor, Tensor] | None = None
    ) -> RowsSummary:
        """This rank's rows as seen by each of `features_BD`, in one pass; `left_out` as `rows_pass.summarize_rows`."""
        if not 0 <= num_neighbors <= self.num_exemplars:
            raise UserError(f"loss.num_neighbors: {num_neighbors}, but the memory has {self.num_exemplars} rows")
        # The kernels leave nothing out.
        summarize = self._summarize_rows if left_out is None else partial(summarize_rows, left_out=left_out)
        options = {"temperature": self.temperature, "chunk_bytes": self.chunk_bytes}
        return summarize(features_BD, self.rows, num_neighbors=num_neighbors, **options)

    def locate(self, row_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the global `row_B` are held here, and their local numbers (some valid number for the others)."""
        local_B = row_B - self.first_row
        return (local_B >= 0) & (local_B < len(self.rows)), local_B.clamp(0, len(self.rows) - 1)

    def similarity(self, row_B: Tensor, features_BD: Tensor) -> Tensor:
        """(B,) float64: x_i . v of the row named for each feature, 0 where another rank holds it."""
        if not len(self.rows):
            return features_BD.new_zeros(len(row_B), dtype=torch.float64)
        is_here_B, local_B = self.locate(row_B)
        rows_BD = self.rows.index_select(0, local_B).to(features_BD.dtype)
        return (rows_BD * features_BD).sum(dim=1).double().masked_fill(~is_here_B, 0.0)

    def subtract_rows_(self, gradient_BD: Tensor, row_Bn: Tensor, weight_Bn: Tensor) -> None:
        """gradient_i -= sum_n weight_in v_{row_in}, over those rows that this rank holds. In place."""
        if not len(self.rows):
            return
        for row_B, weight_B in zip(row_Bn.unbind(1), weight_Bn.to(gradient_BD.dtype).unbind(1), strict=True):
            is_here_B, local_B = self.locate(row_B)
            rows_BD = self.rows.index_select(0, local_B).to(gradient_BD.dtype)
            gradient_BD.addcmul_(rows_BD, weight_B.masked_fill(~is_here_B, 0.0).unsqueeze(1), value=-1.0)

    def set_identities(self, pids: Tensor | None, camids: Tensor | None = None) -> None:
        """Give the exemplars' (N,) integer pids and camids, for `health` alone; they stay on their device."""
        for name, ids in (("pids", pids), ("camids", camids)):
            if ids is not None and ids.shape != (self.num_exemplars,):
                raise UserError(f"memory: {name} of shape {tuple(ids.shape)} for {self.num_exemplars} exemplars")
        self.pids, self.camids = pids, camids

    def health(self) -> dict[str, float]:
        """Diagnostics of rows and latest loss, for the log; waits for the device.

        Returns:
            `rows_never_written`; `mean_staleness`, updates since a row was last written, the mean over written rows;
            `steps_skipped` and `steps_not_finite`, on which some rank said skip or had a feature that was not finite.
            After a loss, of the global batch: `own_similarity`, the mean of x_i . v_{y_i}. With neighbours and pids:
            `neighbor_precision`, the share with the own row's pid, that row left out; with camids
            `neighbor_cross_camera`, of those the share from another camera.

        Collective: one all-reduce, of the same size on every rank whatever is known there.
        """
        written_M, latest, pids_N, camids_N = self.written, self.latest, self.pids, self.camids
        staleness_M = (self.num_updates - 1 - written_M).masked_fill(written_M < 0, 0)
        sums: list[Tensor | float] = [len(written_M), (written_M >= 0).sum(), staleness_M.sum()]
        if latest is not None:
            sums += [len(latest.indices_b), latest.own_similarity_b.sum()]
            if pids_N is not None:
                indices_b1 = latest.indices_b.to(pids_N.device).unsqueeze(1)
                neighbors_bk = latest.neighbors_bk.to(pids_N.device)
                # A feature that is not finite has no neighbours: their numbers may then lie past the last row.
                is_other = (neighbors_bk != indices_b1) & (neighbors_bk < len(pids_N)) & (pids_N[indices_b1] >= 0)
                neighbors_bk = neighbors_bk.clamp(max=len(pids_N) - 1)
                same_pid = is_other & (pids_N[neighbors_bk] == pids_N[indices_b1])
                sums += [is_other.sum(), same_pid.sum()]
                if camids_N is not None:
                    sums += [(same_pid & (camids_N[neighbors_bk] != camids_N[indices_b1])).sum()]
        packed = torch.tensor([float(value) for value in sums] + [0.0] * (8 - len(sums)), dtype=torch.float64)
        rows, written, staleness, seen, similarity, others, same, across = distributed.all_reduce(packed).tolist()

        health = {"rows_never_written": int(rows - written), "mean_staleness": staleness / max(written, 1.0)}
        health["steps_skipped"], health["steps_not_finite"] = self.refused.tolist()
        if seen:
            health["own_similarity"] = similarity / seen
        if others:
            health["neighbor_precision"] = same / others
        if same and camids_N is not None:
            health["neighbor_cross_camera"] = across / same
        return health

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint to write, or to fill in place: what belongs to rows as DTensors, cut as `RowPartition`."""
        divided = {"rows": self.rows, "written": self.written}
        state = {name: distributed.as_row_sharded(tensor, self.num_exemplars) for name, tensor in divided.items()}
        return state | {"num_updates": torch.tensor(self.num_updates), "refused": self.refused}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, of this number of ranks, once it was filled."""
        for name, tensor in {"rows": self.rows, "written": self.written, "refused": self.refused}.items():
            tensor.copy_(distributed.own_part(state[name]))
        self.num_updates = int(state["num_updates"])

    def load_full(self, rows: Tensor) -> None:
        """Take all (N, D) rows as given, the same on every rank; those not zero count as written. For small N."""
        if rows.shape != (self.num_exemplars, self.dim):
            raise UserError(f"memory: rows {tuple(rows.shape)} given for {(self.num_exemplars, self.dim)}")
        self.rows.copy_(rows[self.first_row : self.first_row + len(self.rows)])
        self._mark_written()

    def load_means(self, features_nD: Tensor, row_n: Tensor) -> None:
        """Set each row to the normalised mean of the features that ranks give for it; a row without any becomes zero.

        `features_nD` are (n, D) on this rank, any n, and `row_n` (n,) int64 the global row of each, below N; a negative
        one gives to no row. Raises `UserError` for shapes that do not fit. Collective: reduce-scatters of about
        `chunk_bytes` each.
        """
        if features_nD.shape != (len(row_n), self.dim):
            raise UserError(f"memory: features {tuple(features_nD.shape)} for {len(row_n)} rows of length {self.dim}")
        features_nD, row_n = features_nD.detach().to(self.rows.device), row_n.to(self.rows.device)
        rank_n, place_n = row_n // self.partition.rows_per_rank, row_n % self.partition.rows_per_rank
        step = max(1, self.chunk_bytes // (8 * self.dim * distributed.world_size()))
        for first in range(0, self.partition.rows_per_rank, step):  # so many of every rank's rows at once
            count = min(step, self.partition.rows_per_rank - first)
            taken = (row_n >= 0) & (place_n >= first) & (place_n < first + count)
            sum_RD = features_nD.new_zeros(count * distributed.world_size(), self.dim, dtype=torch.float64)
            sum_RD.index_add_(0, (rank_n * count + place_n - first)[taken], features_nD[taken].double())
            rows = self.rows[first : first + count]
            own_sum_cD = distributed.reduce_scatter_rows(sum_RD)[: len(rows)]
            rows.copy_(torch.nn.functional.normalize(own_sum_cD, dim=1))
        self._mark_written()

    def _mark_written(self) -> None:
        self.written.copy_(torch.where(self.rows.any(dim=1), max(self.num_updates - 1, 0), -1))

    def full(self) -> Tensor:
        """All (N, D) rows, on every rank. For tests and small N. Collective: two all-gathers."""
        return distributed.all_gather_uneven_rows(self.rows).clone()


def _backend(name: str, rows_MD: Tensor) -> Callable[..., RowsSummary]:
    """The function that passes over the rows. Triton is imported only here, where it was chosen."""
    if name == "torch":
        return summarize_rows
    if name != "triton":
        raise UserError(f"memory.backend: {name!r}; use torch or triton")
    if rows_MD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("memory.backend: triton needs rows on an accelerator, and they are on the CPU; use torch")
    if rows_MD.dtype not in (torch.bfloat16, torch.float16) or rows_MD.shape[1] % 64:
        raise UserError(
            f"memory.backend: triton takes bfloat16 or float16 rows of a length that 64 divides, "
            f"not {str(rows_MD.dtype).removeprefix('torch.')} of length {rows_MD.shape[1]}; change them or use torch"
        )
    try:
        return importlib.import_module("ecn_dist.memory.rows_pass_triton").summarize_rows
    except ModuleNotFoundError as error:
        raise UserError("memory.backend: triton is not installed (pip install triton); or use torch") from error
