"""A global batch before the memory: brought together once, then its losses and its update.

Shape letters: b batch rows here, B on all ranks, M memory rows here, D feature length.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory.losses import bank_loss, proxy_loss, require, target_loss
from ecn_dist.memory.rows_pass import accumulation_dtype

if TYPE_CHECKING:
    from ecn_dist.memory.exemplar_memory import ExemplarMemory

# Significant binary digits, the first one too, and the exponent (of `frexp`) under which the spacing stays the least.
_DIGITS = {torch.bfloat16: (8, -125), torch.float16: (11, -13)}


class GatheredBatch:
    """Features and row numbers of the global batch, as `ExemplarMemory.gather` brings them together.

    Every loss is a scalar in float32 (or float64), differentiable in the features given to `gather`; autocast casts
    nothing in it, and its backward pass has no collective.
    """

    def __init__(self, memory: "ExemplarMemory", features_bD: Tensor, indices_b: Tensor) -> None:
        given = tuple(features_bD.shape), tuple(indices_b.shape)
        if features_bD.ndim != 2 or features_bD.shape[1] != memory.dim or given[1] != given[0][:1]:
            wanted = f"wanted (b, {memory.dim}) and (b,)"
            raise UserError(f"memory: features {given[0]} and indices {given[1]} do not fit; {wanted}")
        device, first = memory.rows.device, distributed.rank() * len(indices_b)
        self.here = slice(first, first + len(indices_b))  # this rank's batch rows
        self._memory, self._own_features_bD = memory, features_bD
        self._indices = distributed.start_all_gather_rows(indices_b.to(device, torch.int64))
        self._features = distributed.start_all_gather_rows(features_bD.detach().to(device))
        self._occurrence_B: Tensor | None = None
        self._is_copied: torch.Event | None = None

    @property
    def features_BD(self) -> Tensor:
        """The features of all ranks, detached, in the type that sums are kept in."""
        features_BD = self._features.wait()
        return features_BD.to(accumulation_dtype(features_BD, self._memory.rows))

    @property
    def indices_B(self) -> Tensor:
        """The row numbers of all ranks."""
        return self._indices.wait()

    def loss(self, num_neighbors: int = 0) -> Tensor:
        """The target loss of formulas.md, the mean over this rank's own batch rows.

        Without neighbours it is the cross entropy of a softmax over all rows at the memory's temperature. Raises
        `UserError`, on all ranks, for indices outside 0..N-1 (an accelerator asserts instead), and for more than N
        neighbours. Collective: as `losses.target_loss`.
        """
        return self._differentiable(target_loss, num_neighbors)

    def bank_loss(self, positives_bD: Tensor, num_neighbors: int = 0) -> Tensor:
        """The loss of FMCL (formulas.md), the mean over this rank's own batch rows.

        The positive of a picture is given; neither its own row nor one that was never written takes part.

        Args:
            positives_bD: (b, D), the momentum encoder's features of the same pictures; no gradient goes there.
            num_neighbors: k, so many of the largest rows are positives too, weighted by the softmax among them.

        Raises `UserError` as `loss`, and for positives of another shape than the features. Collective: as
        `losses.bank_loss`.
        """
        given, wanted = tuple(positives_bD.shape), tuple(self._own_features_bD.shape)
        if given != wanted:
            raise UserError(f"memory: positives {given} for features {wanted}")
        return self._differentiable(bank_loss, positives_bD, num_neighbors)

    def proxy_loss(self, own_b2: Tensor, camids_b: Tensor, *, most_own: int, num_others: int = 50) -> Tensor:
        """The camera-proxy loss of formulas.md: the rows are proxies, those of one cluster side by side.

        It is this rank's part of the sum, times the number of ranks, so that the mean over ranks is the global loss.

        Args:
            own_b2: (b, 2) int64, the proxies of each picture's cluster: first row, and one past the last.
            camids_b: (b,) int64, each picture's camera.
            most_own: At least the longest of all ranges, the same on all ranks: the number of cameras will do.
            num_others: How many of the other proxies take part, the most similar ones.

        Raises `UserError` as `loss`, and so for ranges that are empty, longer than `most_own` or outside the rows.
        Collective: as `losses.proxy_loss`.
        """
        return self._differentiable(proxy_loss, own_b2, camids_b, most_own, num_others)

    @torch.no_grad()
    def update(self, momentum: float, skip: bool | Tensor = False, *, hardest: bool = False) -> None:
        """v_y <- normalised(m v_y + (1 - m) x_i) for every picture of the global batch, in order.

        Call it once a step, after the optimiser's. A step that is skipped, or in which any rank has a feature that is
        not finite (or too large for its norm to be), changes no row on any rank and is counted.

        Args:
            momentum: m, in [0, 1), else a `UserError`.
            skip: Whether this step was not taken, a bool or a scalar tensor; one rank's word counts for all.
            hardest: Each row once, by the picture least similar to it before the update, equals by their order.

        Collective: an all-reduce of one number. Of the device the host only awaits what `_rounds` says.
        """
        if not 0 <= momentum < 1:
            raise UserError(f"memory.momentum: {momentum} in this epoch; it must stay in [0, 1)")
        memory, features_BD, indices_B = self._memory, self.features_BD, self.indices_B
        skip = skip if isinstance(skip, Tensor) else torch.full((), float(skip), device=memory.rows.device)
        skipped = distributed.all_reduce(skip.to(memory.rows.device, torch.float32).reshape(()), "max") > 0
        not_finite = ~torch.linalg.vector_norm(features_BD, dim=1).isfinite().all()
        occurrence_B = self._begin()
        if hardest:
            occurrence_B = occurrence_number(indices_B, memory.similarity(indices_B, features_BD))
        rounds = 1 if hardest else self._rounds()
        if len(memory.rows):
            self._write(occurrence_B, rounds, momentum, ~(skipped | not_finite))
        memory.refused += torch.stack([skipped, not_finite])
        memory.num_updates += 1

    def _write(self, occurrence_B: Tensor, rounds: int, momentum: float, accept: Tensor) -> None:
        """The first occurrences of all rows held here at once, then the second ones, ...; nothing if not `accept`."""
        memory, features_BD, rows_MD, step = self._memory, self.features_BD, self._memory.rows, self._memory.num_updates
        noise_BD = None
        if rows_MD.dtype in _DIGITS:
            # Drawn for the whole batch from the step alone, so that any number of ranks rounds alike.
            generator = torch.Generator(device=rows_MD.device).manual_seed(step)
            noise_BD = torch.rand(features_BD.shape, generator=generator, device=rows_MD.device)
        is_here_B, local_B = memory.locate(self.indices_B)
        batch_rows_B = torch.arange(len(local_B), device=local_B.device)
        for occurrence in range(rounds):
            old_BD = rows_MD[local_B]
            new_BD = F.normalize(torch.lerp(features_BD, old_BD.to(features_BD.dtype), momentum), dim=1)
            if noise_BD is not None:
                new_BD = round_stochastically(new_BD, rows_MD.dtype, noise_BD)
            is_now_B = is_here_B & (occurrence_B == occurrence)
            is_taken_B = is_now_B & accept
            new_BD = torch.where(is_taken_B.unsqueeze(1), new_BD.to(rows_MD.dtype), old_BD)
            new_written_B = torch.where(is_taken_B, step, memory.written[local_B])
            # A fixed number of writes, so that the host need not know how many there are: batch rows that have nothing
            # to write repeat the write of one that has (or, where none has, leave one row as it is).
            writer_B = torch.where(is_now_B, batch_rows_B, is_now_B.byte().argmax())
            rows_MD.index_copy_(0, local_B[writer_B], new_BD[writer_B])
            memory.written.index_copy_(0, local_B[writer_B], new_written_B[writer_B])

    def _differentiable(self, loss_and_gradient: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> Tensor:
        with torch.no_grad(), torch.autocast(self._memory.rows.device.type, enabled=False):
            self._begin()
            loss, gradient_bD = loss_and_gradient(self._memory, self, *arguments)
        return _KnownGradient.apply(self._own_features_bD, loss, gradient_bD)

    def _begin(self) -> Tensor:
        """Check the indices and count repeats: (B,) `occurrence_number`. Begins to bring its maximum to the host."""
        if self._occurrence_B is None:
            indices_B, num_rows = self.indices_B, self._memory.num_exemplars
            rule = f"outside 0..{num_rows - 1}; is the memory as large as the target's training split?"
            is_row_B = (indices_B >= 0) & (indices_B < num_rows)
            require(is_row_B, indices_B, lambda bad: f"memory: indices {bad[:5]} are {rule}")
            self._occurrence_B = occurrence_number(indices_B)
            self._last_occurrence = last = self._occurrence_B.max()
            if last.device.type != "cpu":
                self._last_occurrence = torch.empty((), dtype=last.dtype, pin_memory=True)
                self._last_occurrence.copy_(last, non_blocking=True)
                self._is_copied = torch.Event(last.device)
                self._is_copied.record()
        return self._occurrence_B

    def _rounds(self) -> int:
        """How often the most frequent index occurs.

        On an accelerator the host waits for the copy that `_begin` began, before the loss's pass: so the device is past
        it, or has the pass, the backward pass and the optimiser's step in its queue and does not run dry.
        """
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return int(self._last_occurrence) + 1


def occurrence_number(values_B: Tensor, key_B: Tensor | None = None) -> Tensor:
    """How many equal values come before each of `values_B`, in their own order or in a stable one by `key_B`."""
    position_B = torch.arange(len(values_B), device=values_B.device)
    by_key_B = position_B if key_B is None else torch.argsort(key_B, stable=True)
    order_B = by_key_B[torch.argsort(values_B[by_key_B], stable=True)]
    sorted_B = values_B[order_B]
    first_of_run_B = torch.searchsorted(sorted_B, sorted_B)
    return torch.empty_like(position_B).scatter_(0, order_B, position_B - first_of_run_B)


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round to one of the two neighbouring numbers of half-precision `dtype`, with `noise` in [0, 1).

    Up with the probability of the distance passed: the mean over many is exact, and small steps are not lost.
    """
    digits, least_exponent = _DIGITS[dtype]
    exponent = torch.frexp(values).exponent.clamp_(min=least_exponent)
    spacing = torch.ldexp(torch.ones_like(values), exponent - digits)
    return (torch.floor(values / spacing + noise) * spacing).to(dtype)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient is known with it; backward scales it."""

    @staticmethod
    def forward(ctx: Any, features_bD: Tensor, loss: Tensor, gradient_bD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_bD)
        ctx.features_like = features_bD.device, features_bD.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient_bD,) = ctx.saved_tensors
        return (gradient_bD * loss_gradient).to(*ctx.features_like), None, None
