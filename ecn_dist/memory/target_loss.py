"""The target loss and its gradient from every rank's view of its own rows (METHOD.md: Losses).

With s_ij = x_i . v_j / temperature, w_i = sum_j w_ij, and L_i = log sum_j exp(s_ij):

    loss_i         = w_i L_i - sum_j w_ij s_ij
    d loss_i / d x = (w_i sum_j exp(s_ij - L_i) v_j - sum_j w_ij v_j) / temperature

so the sums over all rows come from `summarize_rows`, and the rest names at most k + 1 rows. Between ranks go the
features, O(B k) numbers, and the gradient; nothing that grows with N.

Shape letters: b batch rows here, B on all ranks, W ranks, M memory rows here, N in all, D feature length, k neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory.rows_pass import RowsSummary, first_largest


@dataclass
class BatchDiagnostics:
    """What the loss saw of this rank's batch rows, kept for the log."""

    indices_b: Tensor
    own_similarity_b: Tensor  # x_i . v_{y_i}, float64
    neighbors_bk: Tensor  # the k nearest rows, global numbers, nearest first, equals by the lower number


@dataclass
class TargetLoss:
    """The target loss on one rank."""

    loss: Tensor  # scalar: the mean over this rank's own batch rows
    gradient_bD: Tensor  # of `loss` with respect to this rank's features
    diagnostics: BatchDiagnostics


def combine(
    summary: RowsSummary,
    features_BD: Tensor,
    indices_B: Tensor,
    rows_MD: Tensor,
    *,
    first_row: int,
    num_exemplars: int,
    temperature: float,
) -> TargetLoss:
    """From each rank's summary of its own rows to the loss and gradient of each rank's own batch rows.

    `first_row` is the global number of this rank's first row. Collectives, in order: exchange of O(B k) float64
    numbers, all-gather of b (k + 1) float64 numbers, reduce-scatter of (B, D).
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batch, num_neighbors, num_rows = indices_B.shape[0] // world_size, summary.top_row_Bk.shape[1], rows_MD.shape[0]

    # Send each batch row's figures to the rank it belongs to. float64 holds row numbers up to 2^53 exactly.
    own_similarity_B = torch.zeros_like(summary.maximum_B, dtype=torch.float64)
    if num_rows:
        is_here_B, local_B = _locate(indices_B, first_row, num_rows)
        own_rows_BD = rows_MD.index_select(0, local_B).to(summary.maximum_B.dtype)
        own_similarity_B = (own_rows_BD * features_BD).sum(dim=1).double().masked_fill(~is_here_B, 0.0)
    top_row_Bk = torch.where(summary.top_row_Bk < num_rows, summary.top_row_Bk + first_row, num_exemplars)
    columns = [summary.maximum_B, summary.normalizer_B, own_similarity_B]
    sent = torch.cat([torch.stack([c.double() for c in columns], 1), summary.top_similarity_Bk, top_row_Bk], dim=1)
    received_Wb = distributed.exchange_rows(sent)
    maximum_Wb, normalizer_Wb, own_similarity_Wb = received_Wb[:, :, :3].unbind(dim=2)
    similarity_Wbk, row_Wbk = received_Wb[:, :, 3:].tensor_split(2, dim=2)

    # Softmax over all rows, and the k nearest of all: rank order is row order, so equals still go to the lower row.
    maximum_b = maximum_Wb.amax(dim=0)
    normalizer_b = (normalizer_Wb * torch.exp((maximum_Wb - maximum_b) / temperature)).sum(dim=0)
    log_normalizer_b = maximum_b / temperature + normalizer_b.log()
    own_similarity_b = own_similarity_Wb.sum(dim=0)
    candidates_bn = similarity_Wbk.transpose(0, 1).flatten(1)
    best_bk = first_largest(candidates_bn, num_neighbors)
    similarity_bk = candidates_bn.gather(1, best_bk)
    neighbors_bk = row_Wbk.transpose(0, 1).flatten(1).gather(1, best_bk)

    indices_b = indices_B[rank * batch : (rank + 1) * batch]
    weight_bk = neighbor_weights(neighbors_bk, indices_b)
    total_weight_b = 1.0 + weight_bk.sum(dim=1)
    named_b = own_similarity_b + (weight_bk * similarity_bk).sum(dim=1)
    loss = (total_weight_b * log_normalizer_b - named_b / temperature).mean()

    # Every rank adds the terms of its own rows to all gradients; each rank receives the sum of its own.
    gathered = distributed.all_gather_rows(torch.cat([log_normalizer_b.unsqueeze(1), neighbors_bk], dim=1))
    log_normalizer_B, neighbors_Bk = gathered[:, 0], gathered[:, 1:].long()
    weight_Bk = neighbor_weights(neighbors_Bk, indices_B)
    factor_B = (1.0 + weight_Bk.sum(dim=1)) * torch.exp(summary.maximum_B / temperature - log_normalizer_B)
    gradient_BD = summary.weighted_sum_BD * factor_B.to(summary.weighted_sum_BD.dtype).unsqueeze(1)
    if num_rows:
        own_weight_B1 = weight_Bk.new_ones(len(indices_B), 1)
        subtract_rows_(
            gradient_BD,
            rows_MD,
            torch.cat([indices_B.unsqueeze(1), neighbors_Bk], dim=1),
            torch.cat([own_weight_B1, weight_Bk], dim=1),
            first_row,
        )
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD.div_(temperature * batch))
    diagnostics = BatchDiagnostics(indices_b, own_similarity_b, neighbors_bk.long())
    return TargetLoss(loss.to(gradient_bD.dtype), gradient_bD, diagnostics)


def neighbor_weights(neighbors_bk: Tensor, indices_b: Tensor) -> Tensor:
    """(b, k) float64: 1/k for each neighbour, 0 for the own row, whose weight is exactly 1 in any case."""
    return (neighbors_bk != indices_b.unsqueeze(1)).double() / max(neighbors_bk.shape[1], 1)


def subtract_rows_(gradient_BD: Tensor, rows_MD: Tensor, row_Bn: Tensor, weight_Bn: Tensor, first_row: int) -> None:
    """gradient_i -= sum_n weight_in v_{row_in}, over those rows that this rank holds. In place."""
    for row_B, weight_B in zip(row_Bn.unbind(1), weight_Bn.to(gradient_BD.dtype).unbind(1), strict=True):
        is_here_B, local_B = _locate(row_B, first_row, rows_MD.shape[0])
        rows_BD = rows_MD.index_select(0, local_B).to(gradient_BD.dtype)
        gradient_BD.addcmul_(rows_BD, weight_B.masked_fill(~is_here_B, 0.0).unsqueeze(1), value=-1.0)


def _locate(row_B: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which of the global `row_B` are held here, and their local numbers (some valid number for the others)."""
    local_B = row_B - first_row
    return (local_B >= 0) & (local_B < num_rows), local_B.clamp(0, num_rows - 1)
