"""The losses against all rows of a memory, and their gradients, from each rank's view of its own rows.

With s_ij = x_i . v_j / temperature, L_i = log sum_j exp s_ij, and constant weights w_ij of positives, w_i in all:

    loss_i         = w_i L_i - sum_j w_ij s_ij
    d loss_i / d x = (w_i sum_j exp(s_ij - L_i) v_j - sum_j w_ij v_j) / temperature

The target loss (formulas.md: Losses) has weight 1 for the picture's own row and 1/k for each of its k nearest. The bank
loss (formulas.md: fmcl) leaves out the own row and those never written; in its place a positive e_i is given, with
weight 1 and a place in the sum, and the k nearest rows have as weights the softmax among them.

In the camera-proxy loss (formulas.md: Camera proxies; Wang et al. 2021) picture i has its own proxies P_i, one for each
camera of its cluster, and H_i, the most similar of the others; with n_i pictures of its camera in the global batch:

    loss           = sum_i 1/n_i (log sum_{q in P_i + H_i} exp s_iq - mean_{p in P_i} s_ip)
    d loss / d x_i = 1/n_i (sum_q softmax_q v_q - mean_p v_p) / temperature

Between ranks go features, gradients, and O(B k) or O(B (|P| + |H|)) numbers; nothing that grows with N.

Shape letters: b batch rows here, B in all, W ranks, D feature length, k neighbours, p own proxies, h others, m = W k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory.rows_pass import RowsSummary, keep_largest

if TYPE_CHECKING:
    from ecn_dist.memory.batch import GatheredBatch
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


@dataclass
class BatchDiagnostics:
    """What the loss saw of this rank's batch rows, kept for the log."""

    indices_b: Tensor
    own_similarity_b: Tensor  # x_i . v_{y_i}, or of the positive that was given, float64
    neighbors_bk: Tensor  # the k nearest rows, global numbers, nearest first, equals by the lower number


def target_loss(memory: "ExemplarMemory", batch: "GatheredBatch", num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The mean loss of this rank's own batch rows, and its gradient (b, D).

    Collective, in order: exchange of O(B k) float64 numbers, all-gather of b (k + 1) of them, reduce-scatter of (B, D).
    """
    features_BD, indices_B, temperature = batch.features_BD, batch.indices_B, memory.temperature
    summary = memory.summarize(features_BD, num_neighbors)
    figures = [summary.maximum_B, summary.normalizer_B, memory.similarity(indices_B, features_BD)]
    figures_Wbf, similarity_bm, row_bm = _exchange(memory, summary, torch.stack([f.double() for f in figures], dim=1))
    log_normalizer_b, own_similarity_b = _log_sum(figures_Wbf, temperature), figures_Wbf[:, :, 2].sum(dim=0)
    similarity_bk, neighbors_bk = keep_largest(similarity_bm, row_bm, num_neighbors)

    indices_b = indices_B[batch.here]
    weight_bk = _neighbor_weights(neighbors_bk, indices_b)
    total_weight_b = 1.0 + weight_bk.sum(dim=1)
    named_b = own_similarity_b + (weight_bk * similarity_bk).sum(dim=1)
    loss = (total_weight_b * log_normalizer_b - named_b / temperature).mean()

    # Every rank adds the terms of its own rows to all gradients; each rank receives the sum of its own.
    gathered_Bn = distributed.all_gather_rows(torch.cat([log_normalizer_b.unsqueeze(1), neighbors_bk], dim=1))
    neighbors_Bk = gathered_Bn[:, 1:].long()
    weight_Bk = _neighbor_weights(neighbors_Bk, indices_B)
    factor_B = (1.0 + weight_Bk.sum(dim=1)) * torch.exp(summary.maximum_B / temperature - gathered_Bn[:, 0])
    gradient_BD = summary.weighted_sum_BD * factor_B.to(features_BD.dtype).unsqueeze(1)
    named_row_Bn = torch.cat([indices_B.unsqueeze(1), neighbors_Bk], dim=1)
    memory.subtract_rows_(gradient_BD, named_row_Bn, torch.nn.functional.pad(weight_Bk, (1, 0), value=1.0))
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD.div_(temperature * len(indices_b)))
    memory.latest = BatchDiagnostics(indices_b, own_similarity_b, neighbors_bk)
    return loss.to(gradient_bD.dtype), gradient_bD


def bank_loss(
    memory: "ExemplarMemory", batch: "GatheredBatch", positives_bD: Tensor, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """As `target_loss`, but the all-gather is of b (2 k + 2) numbers: the weights are not known from the neighbours."""
    features_BD, indices_B, temperature = batch.features_BD, batch.indices_B, memory.temperature
    summary = memory.summarize(features_BD, num_neighbors, left_out=(memory.written < 0, indices_B - memory.first_row))
    sums_B2 = torch.stack([summary.maximum_B.double(), summary.normalizer_B.double()], dim=1)
    sums_Wb2, similarity_bm, row_bm = _exchange(memory, summary, sums_B2)
    similarity_bk, neighbors_bk = keep_largest(similarity_bm, row_bm, num_neighbors)

    positives_bD = positives_bD.detach().to(features_BD)
    positive_b = (features_BD[batch.here] * positives_bD).sum(dim=1).double()
    log_normalizer_b = torch.logaddexp(_log_sum(sums_Wb2, temperature), positive_b / temperature)
    is_none_bk = similarity_bk == -torch.inf
    neighbors_bk = neighbors_bk.masked_fill(is_none_bk, memory.num_exemplars)
    weight_bk = (similarity_bk / temperature).softmax(dim=1).masked_fill(is_none_bk, 0.0)
    total_weight_b = 1.0 + weight_bk.sum(dim=1)
    named_b = positive_b + (weight_bk * similarity_bk.masked_fill(is_none_bk, 0.0)).sum(dim=1)
    loss = (total_weight_b * log_normalizer_b - named_b / temperature).mean()

    told_b2 = torch.stack([total_weight_b, log_normalizer_b], dim=1)
    gathered_Bn = distributed.all_gather_rows(torch.cat([told_b2, weight_bk, neighbors_bk], dim=1))
    weight_Bk, neighbors_Bk = gathered_Bn[:, 2:].tensor_split(2, dim=1)
    factor_B = gathered_Bn[:, 0] * torch.exp(summary.maximum_B / temperature - gathered_Bn[:, 1])
    gradient_BD = summary.weighted_sum_BD * factor_B.to(features_BD.dtype).unsqueeze(1)
    memory.subtract_rows_(gradient_BD, neighbors_Bk.long(), weight_Bk)
    of_rows_bD = distributed.reduce_scatter_rows(gradient_BD)
    factor_b = total_weight_b * torch.exp(positive_b / temperature - log_normalizer_b) - 1.0
    of_positives_bD = positives_bD * factor_b.to(features_BD.dtype).unsqueeze(1)
    gradient_bD = (of_rows_bD + of_positives_bD) / (temperature * len(positives_bD))
    memory.latest = BatchDiagnostics(indices_B[batch.here], positive_b, neighbors_bk)
    return loss.to(gradient_bD.dtype), gradient_bD


def proxy_loss(
    memory: "ExemplarMemory", batch: "GatheredBatch", own_b2: Tensor, camids_b: Tensor, most_own: int, num_others: int
) -> tuple[Tensor, Tensor]:
    """This rank's part of the loss times W, and its gradient (b, D). Arguments as `GatheredBatch.proxy_loss`.

    Collective, in order: all-gather of (b, 3) integers, exchange of O(B n) float64 numbers, all-gather of (b, 2 n) of
    them, reduce-scatter of (B, D).
    """
    features_BD, here, num_rows, device = batch.features_BD, batch.here, memory.num_exemplars, memory.rows.device
    about_b3 = torch.cat([own_b2, camids_b.unsqueeze(1)], dim=1)
    about_B3 = distributed.all_gather_rows(about_b3.to(device, torch.int64))
    start_B1, stop_B1, camids_B = about_B3[:, :1], about_B3[:, 1:2], about_B3[:, 2]
    good_B1 = (start_B1 >= 0) & (start_B1 < stop_B1) & (stop_B1 <= num_rows) & (stop_B1 - start_B1 <= most_own)
    rule = f"of a picture's own is not 1 to {most_own} of the {num_rows} rows"
    require(good_B1.squeeze(1), about_B3[:, :2], lambda bad: f"proxies: the range {bad[0]} {rule}")

    # So many nearest rows that enough are left without the own ones. Row number N stands for a free place.
    summary = memory.summarize(features_BD, min(num_others + most_own, num_rows))
    own_row_Bp = start_B1 + torch.arange(most_own, device=device)
    own_row_Bp = torch.where(own_row_Bp < stop_B1, own_row_Bp, num_rows)
    own_similarity_Bp = torch.stack([memory.similarity(row_B, features_BD) for row_B in own_row_Bp.unbind(1)], dim=1)
    own_similarity_Wbp, candidates_bm, row_bm = _exchange(memory, summary, own_similarity_Bp)
    is_own_bm = (row_bm >= start_B1[here]) & (row_bm < stop_B1[here])
    others_bh, other_row_bh = keep_largest(candidates_bm.masked_fill(is_own_bm, -torch.inf), row_bm, num_others)

    own_row_bp, own_similarity_bp = own_row_Bp[here], own_similarity_Wbp.sum(dim=0)
    is_own_bp = own_row_bp < num_rows
    own_share_bp = is_own_bp.double() / is_own_bp.sum(dim=1, keepdim=True)
    own_or_none_bp = own_similarity_bp.masked_fill(~is_own_bp, -torch.inf)
    scaled_bn = torch.cat([own_or_none_bp, others_bh], dim=1) / memory.temperature
    mean_own_b = (own_share_bp * own_similarity_bp).sum(dim=1) / memory.temperature
    weight_b = distributed.world_size() / (camids_B[here].unsqueeze(1) == camids_B).sum(dim=1).double()
    loss = (weight_b * (scaled_bn.logsumexp(dim=1) - mean_own_b)).sum()

    softmax_bn = scaled_bn.softmax(dim=1)
    softmax_bn[:, :most_own] -= own_share_bp
    coefficient_bn = softmax_bn * (weight_b / memory.temperature).unsqueeze(1)
    gathered = distributed.all_gather_rows(torch.cat([coefficient_bn, own_row_bp, other_row_bh], dim=1))
    coefficient_Bn, row_Bn = gathered.tensor_split(2, dim=1)
    gradient_BD = torch.zeros_like(features_BD)
    memory.subtract_rows_(gradient_BD, row_Bn.long(), -coefficient_Bn)
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD)
    return loss.to(gradient_bD.dtype), gradient_bD


def _exchange(memory: "ExemplarMemory", summary: RowsSummary, figures_Bf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Send each batch row's float64 figures, and its nearest rows here, to the rank that the batch row belongs to.

    What came: figures (W, b, f), similarities (b, m) in row order, and global row numbers (b, m), N for a free place.
    """
    is_row_Bk = summary.top_row_Bk < len(memory.rows)
    row_Bk = torch.where(is_row_Bk, summary.top_row_Bk + memory.first_row, memory.num_exemplars)
    # float64 holds row numbers up to 2^53 exactly.
    received_Wb = distributed.exchange_rows(torch.cat([figures_Bf, summary.top_similarity_Bk, row_Bk], dim=1))
    nearest_bW = received_Wb[:, :, figures_Bf.shape[1] :].transpose(0, 1)
    similarity_bWk, row_bWk = nearest_bW.tensor_split(2, dim=2)
    return received_Wb[:, :, : figures_Bf.shape[1]], similarity_bWk.flatten(1), row_bWk.flatten(1).long()


def require(good_B: Tensor, values: Tensor, error: Callable[[list], str]) -> None:
    """Refuse the `values` that are not good, the same on all ranks; on an accelerator by a device-side assertion."""
    if good_B.device.type != "cpu":
        torch._assert_async(good_B.all(), "memory: an index or a range lies outside the rows")
    elif not good_B.all():
        raise UserError(error(values[~good_B].tolist()), on_all_ranks=True)


def _log_sum(figures_Wbf: Tensor, temperature: float) -> Tensor:
    """(b,) log sum exp s over the rows of all ranks; the first figures are maximum and normaliser of a rank's."""
    maximum_Wb, normalizer_Wb = figures_Wbf[:, :, 0], figures_Wbf[:, :, 1]
    maximum_b = maximum_Wb.amax(dim=0)
    normalizer_b = (normalizer_Wb * torch.exp((maximum_Wb - maximum_b) / temperature)).sum(dim=0)
    return maximum_b / temperature + normalizer_b.log()


def _neighbor_weights(neighbors_bk: Tensor, indices_b: Tensor) -> Tensor:
    """(b, k) float64: 1/k for each neighbour, 0 for the own row, whose weight is exactly 1 in any case."""
    return (neighbors_bk != indices_b.unsqueeze(1)).double() / max(neighbors_bk.shape[1], 1)
