"""The exemplar memory: one row for each target training image, the rows divided among the ranks.

Shape letters: b batch rows here, B on all ranks, M memory rows here, N in all, D feature length, k neighbours.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError
from ecn_dist.memory.gathered import GatheredBatch
from ecn_dist.memory.health import MemoryHealth, measure_health
from ecn_dist.memory.row_update import update_rows_
from ecn_dist.memory.rows_pass import RowsSummary, accumulation_dtype, default_chunk_bytes, summarize_rows
from ecn_dist.memory.target_loss import BatchDiagnostics, TargetLoss, combine

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ExemplarMemory:
    """N rows of length D, rank r holding the contiguous part `partition.start(r)` to `partition.stop(r)`.

    `num_exemplars` is N, `dim` D; `temperature` the beta of the softmax; `dtype` of the rows: float32, bfloat16 or
    float16, or float64 for tests. Sums are in float32 at least, whatever the types of rows and features. The rows are
    passed over in chunks that touch about `chunk_bytes`, so that working memory above the rows is less than that and a
    few times (B, D), whatever N. `backend` "triton" takes the kernels of `triton_pass` for that pass (bfloat16 or
    float16 rows on an accelerator, D a multiple of 64). Rows start at zero. Works with or without a process group,
    which must be up before the memory is made, and stay.

    `rows` is this rank's plain (M, D) tensor.
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
        self.num_exemplars = num_exemplars
        self.dim = dim
        self.temperature = temperature
        self.partition = RowPartition(num_exemplars, distributed.world_size())
        self.first_row = self.partition.start(distributed.rank())
        num_rows = self.partition.size(distributed.rank())
        self.rows = torch.zeros(num_rows, dim, device=device, dtype=dtype)
        self.chunk_bytes = chunk_bytes or default_chunk_bytes(self.rows.device)
        self._summarize_rows = _backend(backend, self.rows)
        self._written = torch.full((num_rows,), -1, device=self.rows.device)  # the update that wrote a row last
        self._num_updates = 0
        self._refused = torch.zeros(2, dtype=torch.int64, device=self.rows.device)  # steps: skipped, not finite
        self._pids: Tensor | None = None
        self._camids: Tensor | None = None
        self._latest: BatchDiagnostics | None = None

    def gather(self, features: Tensor, indices: Tensor) -> GatheredBatch:
        """Begin to bring (b, D) `features` and (b,) int64 `indices` of all ranks together, and return at once.

        Give the result to `loss` and `update` as `gathered`: they then need not gather themselves, and what lies
        between (such as the source loss) hides the transfer. Collective: two all-gathers.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or indices.shape != features.shape[:1]:
            raise UserError(
                f"memory: features {tuple(features.shape)} and indices {tuple(indices.shape)} do not fit; "
                f"wanted (b, {self.dim}) and (b,)"
            )
        device = self.rows.device
        return GatheredBatch(
            indices=distributed.start_all_gather_rows(indices.to(device, torch.int64)),
            features=distributed.start_all_gather_rows(features.detach().to(device)),
        )

    def loss(
        self, features: Tensor, indices: Tensor, num_neighbors: int = 0, *, gathered: GatheredBatch | None = None
    ) -> Tensor:
        """The target loss of METHOD.md, the mean over this rank's own batch rows: a scalar in float32 (or float64).

        `features` (b, D), any floating type, equal b on all ranks; differentiable. `indices` (b,) int64, the rows'
        global numbers. `num_neighbors` is k, 0 for the exemplar's own row alone. Under autocast nothing here is cast.
        Raises `UserError`, on all ranks alike, for indices outside 0..N-1 (on an accelerator a device-side assertion)
        and for more neighbours than rows. Collective: as `gather` and `target_loss.combine`; backward none.
        """
        if not 0 <= num_neighbors <= self.num_exemplars:
            raise UserError(f"loss.num_neighbors: {num_neighbors}, but the memory has {self.num_exemplars} rows")
        gathered = gathered or self.gather(features, indices)
        with torch.autocast(self.rows.device.type, enabled=False):
            return _TargetLossFunction.apply(features, self, gathered, num_neighbors)

    @torch.no_grad()
    def _loss_and_gradient(self, gathered: GatheredBatch, num_neighbors: int) -> TargetLoss:
        indices_B = gathered.indices_B
        self._check_indices(indices_B)
        gathered.count_repeats()  # for the update to come
        features_BD = gathered.features_BD
        features_BD = features_BD.to(accumulation_dtype(features_BD, self.rows))
        summary = self._summarize_rows(
            features_BD,
            self.rows,
            temperature=self.temperature,
            num_neighbors=num_neighbors,
            chunk_bytes=self.chunk_bytes,
        )
        result = combine(
            summary,
            features_BD,
            indices_B,
            self.rows,
            first_row=self.first_row,
            num_exemplars=self.num_exemplars,
            temperature=self.temperature,
        )
        self._latest = result.diagnostics
        return result

    def _check_indices(self, indices_B: Tensor) -> None:
        """Every rank sees the same indices, so all raise alike, or none."""
        inside = ((indices_B >= 0) & (indices_B < self.num_exemplars)).all()
        if indices_B.device.type != "cpu":
            torch._assert_async(inside, f"memory: an index is outside 0..{self.num_exemplars - 1}")
        elif not inside:
            outside = indices_B[(indices_B < 0) | (indices_B >= self.num_exemplars)].tolist()
            raise UserError(
                f"memory: indices {outside[:5]} are outside 0..{self.num_exemplars - 1}; "
                "is the memory as large as the target's training split?",
                on_all_ranks=True,
            )

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        indices: Tensor,
        momentum: float,
        skip: bool | Tensor = False,
        *,
        gathered: GatheredBatch | None = None,
    ) -> None:
        """v_y <- normalised(m v_y + (1 - m) x_i) for every row of the global batch, in order (METHOD.md).

        Call it once a step, after the optimiser's, with the rows given to `loss` (detached). `momentum` is m, in
        [0, 1). `skip` says that this step was not taken (a bool, or a scalar tensor where the host does not know); one
        rank's word counts for all. A step that is skipped, or in which any rank has a feature that is not finite (or
        too large for its norm to be), changes no row on any rank and is counted. Collective: as `gather`, and an
        all-reduce of one number. Of the device the host only awaits what `GatheredBatch.rounds` says.
        """
        if not 0 <= momentum < 1:
            raise UserError(f"memory.momentum: {momentum} in this epoch; it must stay in [0, 1)")
        gathered = gathered or self.gather(features, indices)
        device = self.rows.device
        skip = skip if isinstance(skip, Tensor) else torch.full((), float(skip), device=device)
        skipped = distributed.all_reduce(skip.to(device, torch.float32).reshape(()), "max") > 0
        features_BD, indices_B = gathered.features_BD, gathered.indices_B
        self._check_indices(indices_B)
        features_BD = features_BD.to(accumulation_dtype(features_BD, self.rows))
        not_finite = ~torch.linalg.vector_norm(features_BD, dim=1).isfinite().all()
        update_rows_(
            self.rows,
            self._written,
            features_BD,
            indices_B - self.first_row,
            occurrence_B=gathered.count_repeats(),
            rounds=gathered.rounds(),
            momentum=momentum,
            accept=~(skipped | not_finite),
            step=self._num_updates,
        )
        self._refused += torch.stack([skipped, not_finite])
        self._num_updates += 1

    @property
    def neighbors(self) -> Tensor | None:
        """(b, k) global row numbers of the latest loss's neighbours, nearest first; None before the first loss."""
        return self._latest.neighbors_bk if self._latest else None

    def set_identities(self, pids: Tensor | None, camids: Tensor | None = None) -> None:
        """Give the exemplars' (N,) integer pids and camids, for `health` alone: they never enter loss or update.

        They stay where they are (a memory-mapped array on the CPU costs nothing); None takes them away.
        """
        for name, ids in (("pids", pids), ("camids", camids)):
            if ids is not None and ids.shape != (self.num_exemplars,):
                raise UserError(f"memory: {name} of shape {tuple(ids.shape)} for {self.num_exemplars} exemplars")
        self._pids, self._camids = pids, camids

    def health(self) -> MemoryHealth:
        """Diagnostics of the rows, and of the latest loss: for the log, every now and then.

        O(N / W) integers read, two small all-reduces; synchronises with the host.
        """
        return measure_health(self._written, self._num_updates, self._refused, self._latest, self._pids, self._camids)

    def local_state(self) -> dict[str, Tensor]:
        """What belongs to this rank's rows, each (M, ...) and cut like the rows (torch.chunk's and Shard(0)'s cut)."""
        return {"rows": self.rows, "written": self._written}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `local_state` gave, for the same part of the rows."""
        _copy_all(self.local_state(), state)

    def global_state(self) -> dict[str, Tensor]:
        """What is the same on all ranks: the number of updates and of refused steps."""
        return {"num_updates": torch.tensor(self._num_updates), "refused": self._refused}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `global_state` gave, on any number of ranks."""
        own = self.global_state()
        _copy_all(own, state)
        self._num_updates = int(own["num_updates"])

    def load_full(self, rows: Tensor) -> None:
        """Take all (N, D) rows as given, not normalised; every rank gives the same. For tests and small N.

        Rows other than zero count as written by the update before.
        """
        if rows.shape != (self.num_exemplars, self.dim):
            raise UserError(f"memory: rows {tuple(rows.shape)} given for {(self.num_exemplars, self.dim)}")
        self.rows.copy_(rows[self.first_row : self.first_row + len(self.rows)])
        self._written.copy_(torch.where(self.rows.any(dim=1), max(self._num_updates - 1, 0), -1))

    def full(self) -> Tensor:
        """All (N, D) rows, on every rank. For tests and small N. Collective: one all-gather."""
        padded = self.rows.new_zeros(self.partition.rows_per_rank, self.dim)
        padded[: len(self.rows)] = self.rows
        return distributed.all_gather_rows(padded)[: self.num_exemplars].clone()


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


def _copy_all(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if wanted != found:
        raise UserError(f"memory: state {found} does not fit this memory's {wanted}")
    for name, tensor in own.items():
        tensor.copy_(given[name])


class _TargetLossFunction(torch.autograd.Function):
    """The gradient is known when the loss is; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, memory: ExemplarMemory, gathered: GatheredBatch, num_neighbors: int
    ) -> Tensor:
        result = memory._loss_and_gradient(gathered, num_neighbors)
        ctx.save_for_backward(result.gradient_bD)
        ctx.features_like = features.dtype, features.device
        return result.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_bD,) = ctx.saved_tensors
        dtype, device = ctx.features_like
        return (gradient_bD * loss_gradient).to(device, dtype), None, None, None
