"""The loss against a bank whose positives come from elsewhere (METHODS.md: fmcl), on divided rows.

The picture's own row takes no part, nor does a row that was never written. With the positive e_i given, s_i0 =
x_i . e_i / temperature, s_ij over the other written rows, L_i = log (exp s_i0 + sum_j exp s_ij), and u_ij the softmax
of the k largest s_ij alone (constants; 0 where there is no row):

    loss_i         = (1 + sum_j u_ij) L_i - s_i0 - sum_j u_ij s_ij
    d loss_i / d x = ((1 + sum_j u_ij) (p_i0 e_i + sum_j p_ij v_j) - e_i - sum_j u_ij v_j) / temperature

Shape letters: b batch rows here, B on all ranks, W ranks, D feature length, k neighbours.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory.target_loss import BatchDiagnostics, global_rows, merge

if TYPE_CHECKING:
    from ecn_dist.memory.batch import GatheredBatch
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


def bank_loss(
    memory: "ExemplarMemory", batch: "GatheredBatch", positives_bD: Tensor, num_neighbors: int
) -> tuple[Tensor, Tensor, BatchDiagnostics]:
    """The mean loss of this rank's own batch rows, its gradient (b, D), and what the log may tell.

    Collective, in order: exchange of O(B k) float64 numbers, all-gather of b (2 k + 2) float64 numbers, reduce-scatter
    of (B, D).
    """
    rank, temperature, features_BD, indices_B = (
        distributed.rank(),
        memory.temperature,
        batch.features_BD,
        batch.indices_B,
    )
    batch_size = len(indices_B) // distributed.world_size()
    here = slice(rank * batch_size, (rank + 1) * batch_size)
    left_out = memory.written < 0, indices_B - memory.first_row
    summary = memory.summarize(features_BD, num_neighbors, left_out=left_out)
    sums_B2 = torch.stack([summary.maximum_B.double(), summary.normalizer_B.double()], dim=1)
    sent = torch.cat([sums_B2, summary.top_similarity_Bk, global_rows(memory, summary)], dim=1)
    received_Wb = distributed.exchange_rows(sent)
    log_rows_b, similarity_bk, neighbors_bk = merge(received_Wb[:, :, :2], received_Wb[:, :, 2:], temperature)

    positives_bD = positives_bD.detach().to(features_BD)
    positive_b = (features_BD[here] * positives_bD).sum(dim=1).double()
    log_normalizer_b = torch.logaddexp(log_rows_b, positive_b / temperature)
    is_row_bk = similarity_bk != -torch.inf
    weight_bk = (similarity_bk / temperature).softmax(dim=1).masked_fill(~is_row_bk, 0.0)
    named_b = positive_b + (weight_bk * similarity_bk.masked_fill(~is_row_bk, 0.0)).sum(dim=1)
    total_weight_b = 1.0 + weight_bk.sum(dim=1)
    loss = (total_weight_b * log_normalizer_b - named_b / temperature).mean()

    columns = [total_weight_b.unsqueeze(1), log_normalizer_b.unsqueeze(1), weight_bk, neighbors_bk]
    gathered_Bn = distributed.all_gather_rows(torch.cat(columns, dim=1))
    weight_Bk, neighbors_Bk = gathered_Bn[:, 2:].tensor_split(2, dim=1)
    factor_B = gathered_Bn[:, 0] * torch.exp(summary.maximum_B / temperature - gathered_Bn[:, 1])
    gradient_BD = summary.weighted_sum_BD * factor_B.to(features_BD.dtype).unsqueeze(1)
    memory.subtract_rows_(gradient_BD, neighbors_Bk.long(), weight_Bk)
    of_rows_bD = distributed.reduce_scatter_rows(gradient_BD)
    factor_b = total_weight_b * torch.exp(positive_b / temperature - log_normalizer_b) - 1.0
    of_positives_bD = positives_bD * factor_b.to(features_BD.dtype).unsqueeze(1)
    gradient_bD = (of_rows_bD + of_positives_bD) / (temperature * batch_size)
    neighbors_bk = neighbors_bk.long().masked_fill(~is_row_bk, memory.num_exemplars)
    return loss.to(gradient_bD.dtype), gradient_bD, BatchDiagnostics(indices_B[here], positive_b, neighbors_bk)
