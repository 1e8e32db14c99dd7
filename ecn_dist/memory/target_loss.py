"""The target loss and its gradient from every rank's view of its own rows (METHOD.md: Losses).

With s_ij = x_i . v_j / temperature, w_i = sum_j w_ij, and L_i = log sum_j exp(s_ij):

    loss_i         = w_i L_i - sum_j w_ij s_ij
    d loss_i / d x = (w_i sum_j exp(s_ij - L_i) v_j - sum_j w_ij v_j) / temperature

so the sums over all rows come from `summarize_rows`, and the rest names at most k + 1 rows. Between ranks go the
features, O(B k) numbers, and the gradient; nothing that grows with N.

Shape letters: b batch rows here, B on all ranks, W ranks, M memory rows here, N in all, D feature length, k neighbours.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory.rows_pass import RowsSummary, first_largest

if TYPE_CHECKING:
    from ecn_dist.memory.batch import GatheredBatch
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


@dataclass
class BatchDiagnostics:
    """What the loss saw of this rank's batch rows, kept for the log."""

    indices_b: Tensor
    own_similarity_b: Tensor  # x_i . v_{y_i}, float64
    neighbors_bk: Tensor  # the k nearest rows, global numbers, nearest first, equals by the lower number


def combine(
    memory: "ExemplarMemory", batch: "GatheredBatch", summary: RowsSummary
) -> tuple[Tensor, Tensor, BatchDiagnostics]:
    """From each rank's summary of its own rows to the loss and gradient of each rank's own batch rows.

    Collective, in order: exchange of O(B k) float64 numbers, all-gather of b (k + 1) float64 numbers, reduce-scatter of
    (B, D).
    """
    rank, temperature, indices_B = distributed.rank(), memory.temperature, batch.indices_B
    batch_size = len(indices_B) // distributed.world_size()

    # Send each batch row's figures to the rank it belongs to. float64 holds row numbers up to 2^53 exactly.
    own_similarity_B = memory.similarity(indices_B, batch.features_BD)
    columns = [summary.maximum_B, summary.normalizer_B, own_similarity_B]
    top_row_Bk = global_rows(memory, summary)
    sent = torch.cat([torch.stack([c.double() for c in columns], 1), summary.top_similarity_Bk, top_row_Bk], dim=1)
    received_Wb = distributed.exchange_rows(sent)
    own_similarity_b = received_Wb[:, :, 2].sum(dim=0)
    log_normalizer_b, similarity_bk, neighbors_bk = merge(received_Wb[:, :, :2], received_Wb[:, :, 3:], temperature)

    indices_b = indices_B[rank * batch_size : (rank + 1) * batch_size]
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
    named_row_Bn = torch.cat([indices_B.unsqueeze(1), neighbors_Bk], dim=1)
    own_weight_B1 = weight_Bk.new_ones(len(indices_B), 1)
    memory.subtract_rows_(gradient_BD, named_row_Bn, torch.cat([own_weight_B1, weight_Bk], dim=1))
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD.div_(temperature * batch_size))
    diagnostics = BatchDiagnostics(indices_b, own_similarity_b, neighbors_bk.long())
    return loss.to(gradient_bD.dtype), gradient_bD, diagnostics


def merge(sums_Wb2: Tensor, nearest_Wbn: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over the rows of all ranks, and the k nearest of all.

    Args:
        sums_Wb2: Maximum and normaliser of each rank's rows.
        nearest_Wbn: Each rank's k similarities, then the k row numbers.
        temperature: The beta of the softmax.

    Returns:
        log sum exp s (b,), and the nearest rows' similarities and numbers (b, k), equals by the lower row.
    """
    maximum_Wb, normalizer_Wb = sums_Wb2.unbind(dim=2)
    similarity_Wbk, row_Wbk = nearest_Wbn.tensor_split(2, dim=2)
    maximum_b = maximum_Wb.amax(dim=0)
    normalizer_b = (normalizer_Wb * torch.exp((maximum_Wb - maximum_b) / temperature)).sum(dim=0)
    candidates_bn = similarity_Wbk.transpose(0, 1).flatten(1)  # rank order is row order
    best_bk = first_largest(candidates_bn, similarity_Wbk.shape[2])
    neighbors_bk = row_Wbk.transpose(0, 1).flatten(1).gather(1, best_bk)
    return maximum_b / temperature + normalizer_b.log(), candidates_bn.gather(1, best_bk), neighbors_bk


def global_rows(memory: "ExemplarMemory", summary: RowsSummary) -> Tensor:
    """(B, k) the global numbers of this rank's nearest rows; N for free places."""
    is_row_Bk = summary.top_row_Bk < len(memory.rows)
    return torch.where(is_row_Bk, summary.top_row_Bk + memory.first_row, memory.num_exemplars)


def neighbor_weights(neighbors_bk: Tensor, indices_b: Tensor) -> Tensor:
    """(b, k) float64: 1/k for each neighbour, 0 for the own row, whose weight is exactly 1 in any case."""
    return (neighbors_bk != indices_b.unsqueeze(1)).double() / max(neighbors_bk.shape[1], 1)
