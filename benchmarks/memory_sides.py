"""The formulations of a memory step that the benchmark compares: each does loss, gradient and update, and they agree.

Shape letters: b batch rows here, B on all ranks, W ranks, M memory rows here, N in all, D feature length, k neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory import ExemplarMemory
from ecn_dist.memory.rows_pass import accumulation_dtype

TEMPERATURE = 0.05
MOMENTUM = 0.3
_BLOCK = 256  # rows drawn from one seed

Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: N, D, B, k and the type of the rows."""

    exemplars: int
    dim: int
    batch: int
    neighbors: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of N unit rows, the same whichever rank asks."""
        rows_MD = torch.empty(last - first, self.dim, dtype=self.dtype, device=self.device)
        for block in range(first // _BLOCK, -(-last // _BLOCK)):
            block_rows = torch.randn(_BLOCK, self.dim, generator=torch.Generator().manual_seed(block))
            block_rows = torch.nn.functional.normalize(block_rows, dim=1)
            start, stop = max(first, block * _BLOCK), min(last, (block + 1) * _BLOCK)
            rows_MD[start - first : stop - first] = block_rows[start - block * _BLOCK : stop - block * _BLOCK]
        return rows_MD

    def batch_part(self) -> tuple[Tensor, Tensor]:
        """This rank's (b, D) features, each near its exemplar's row, and its (b,) indices; indices differ."""
        generator = torch.Generator().manual_seed(self.exemplars + self.batch)
        indices_B = torch.randint(self.exemplars, (4 * self.batch,), generator=generator).unique()
        indices_B = indices_B[torch.randperm(len(indices_B), generator=generator)][: self.batch]
        noise_BD = torch.randn(len(indices_B), self.dim, generator=generator) / self.dim**0.5
        at = slice(distributed.rank() * self.batch_here, (distributed.rank() + 1) * self.batch_here)
        rows_bD = torch.cat([self.rows(index, index + 1) for index in indices_B[at].tolist()])
        rows_bD = rows_bD.to("cpu", accumulation_dtype(rows_bD))
        features_bD = torch.nn.functional.normalize(rows_bD + noise_BD[at], dim=1)
        return features_bD.to(self.device), indices_B[at].to(self.device)

    @property
    def batch_here(self) -> int:
        return self.batch // distributed.world_size()


def sharded(case: Case, backend: str = "torch") -> tuple[Step, ExemplarMemory]:
    """`ExemplarMemory`, as training uses it: one gather for loss and update."""
    memory = ExemplarMemory(
        case.exemplars,
        case.dim,
        TEMPERATURE,
        case.device,
        case.dtype,
        backend=backend,  # type: ignore[arg-type]
    )
    memory.rows.copy_(case.rows(memory.first_row, memory.first_row + len(memory.rows)))
    features_bD, indices_b = case.batch_part()

    def step() -> tuple[Tensor, Tensor]:
        features = features_bD.clone().requires_grad_()
        batch = memory.gather(features, indices_b)
        loss = batch.loss(case.neighbors)
        loss.backward()
        batch.update(MOMENTUM)
        assert features.grad is not None
        return loss.detach(), features.grad

    return step, memory


def bare_products(case: Case, rows_MD: Tensor) -> Callable[[], object]:
    """The two matrix products that a step cannot avoid, with the global batch on this rank's rows, results thrown away.

    In the rows' own type throughout: half-precision rows are then multiplied faster than any exact sum could be.
    """
    features_BD = distributed.all_gather_rows(case.batch_part()[0]).to(case.dtype)
    similarity_BM = torch.zeros(len(features_BD), len(rows_MD), dtype=case.dtype, device=case.device)
    result_BD = torch.empty_like(features_BD)

    def step() -> None:
        torch.mm(features_BD, rows_MD.t(), out=similarity_BM)
        torch.mm(similarity_BM, rows_MD, out=result_BD)

    return step


def published(case: Case) -> tuple[Step, Tensor]:
    """The published formulation: all rows on every rank, the full (b, N) matrix, a full sort, a loop over the batch.

    Its gradient is written out (one product more), so that it does not pay for autograd's bookkeeping.
    """
    rows_ND = case.rows(0, case.exemplars)
    features_bD, indices_b = case.batch_part()
    batch_rows = torch.arange(len(indices_b), device=case.device)
    wide = accumulation_dtype(rows_ND)

    @torch.no_grad()
    def step() -> tuple[Tensor, Tensor]:
        features = features_bD.to(case.dtype)
        scaled_bN = (features @ rows_ND.t()).to(wide).div_(TEMPERATURE)
        log_p_bN = torch.log_softmax(scaled_bN, dim=1)
        weight_bN = torch.zeros_like(log_p_bN)
        if case.neighbors:
            order_bN = torch.argsort(scaled_bN, dim=1, descending=True)
            weight_bN.scatter_(1, order_bN[:, : case.neighbors], 1.0 / case.neighbors)
        weight_bN[batch_rows, indices_b] = 1.0
        loss = -(weight_bN * log_p_bN).sum(dim=1).mean()
        gradient_bN = log_p_bN.exp_().mul_(weight_bN.sum(dim=1, keepdim=True)).sub_(weight_bN)
        gradient_bD = gradient_bN.to(case.dtype) @ rows_ND / (TEMPERATURE * len(features))
        all_features = distributed.all_gather_rows(features)
        for feature, index in zip(all_features, distributed.all_gather_rows(indices_b).tolist(), strict=True):
            row = MOMENTUM * rows_ND[index] + (1.0 - MOMENTUM) * feature
            rows_ND[index] = row / row.norm()
        return loss, gradient_bD.to(wide)

    return step, rows_ND
