"""The camera-proxy loss (METHODS.md: Camera proxies; Wang et al. 2021, "Camera-aware Proxies") on divided rows.

Picture i has its own proxies P_i, one for each camera of its cluster, and H_i, the most similar of the others. With
s_p = x_i . v_p / temperature and n_i pictures of its camera in the global batch:

    loss         = sum_i 1/n_i (log sum_{q in P_i + H_i} exp s_q - mean_{p in P_i} s_p)
    d loss / d x = 1/n_i (sum_q softmax_q v_q - mean_p v_p) / temperature

Between ranks go the features, O(B (|P| + |H|)) numbers, and the gradient; nothing that grows with the rows.

Shape letters: b batch rows here, B on all ranks, W ranks, D feature length, p own proxies at most, h others, n = p + h,
k nearest rows of a rank.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory.rows_pass import first_largest
from ecn_dist.memory.target_loss import global_rows

if TYPE_CHECKING:
    from ecn_dist.memory.batch import GatheredBatch
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


def proxy_loss(
    memory: "ExemplarMemory",
    batch: "GatheredBatch",
    own_b2: Tensor,
    camids_b: Tensor,
    *,
    most_own: int,
    num_others: int,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the loss times W, and its gradient (b, D) in this rank's features.

    Arguments are those of `GatheredBatch.proxy_loss`.

    Collective, in order: all-gather of (b, 3) integers, exchange of O(B n) float64 numbers, all-gather of (b, 2 n) of
    them, reduce-scatter of (B, D).
    """
    rank, world_size, features_BD = distributed.rank(), distributed.world_size(), batch.features_BD
    batch_size, num_rows, device = len(features_BD) // world_size, memory.num_exemplars, features_BD.device
    here = slice(rank * batch_size, (rank + 1) * batch_size)
    about_b3 = torch.cat([own_b2, camids_b.unsqueeze(1)], dim=1).to(device, torch.int64)
    start_B, stop_B, camids_B = distributed.all_gather_rows(about_b3).unbind(dim=1)
    _check_ranges(start_B, stop_B, most_own, num_rows)

    # Each rank's nearest rows, so many that enough are left without the picture's own; and the own ones, which are
    # zero on all ranks but the one that holds them. Row number N stands for a free place.
    summary = memory.summarize(features_BD, min(num_others + most_own, num_rows))
    own_row_Bp = start_B.unsqueeze(1) + torch.arange(most_own, device=device)
    own_row_Bp = torch.where(own_row_Bp < stop_B.unsqueeze(1), own_row_Bp, num_rows)
    own_similarity_Bp = torch.stack([memory.similarity(row_B, features_BD) for row_B in own_row_Bp.unbind(1)], dim=1)
    columns = [own_similarity_Bp, summary.top_similarity_Bk.double(), global_rows(memory, summary).double()]
    received_Wb = distributed.exchange_rows(torch.cat(columns, dim=1))
    own_similarity_bp = received_Wb[:, :, :most_own].sum(dim=0)
    similarity_Wbk, row_Wbk = received_Wb[:, :, most_own:].tensor_split(2, dim=2)

    # The most similar others: rank order is row order, so equals go to the lower row.
    candidates_bm, row_bm = similarity_Wbk.transpose(0, 1).flatten(1), row_Wbk.transpose(0, 1).flatten(1).long()
    is_own_bm = (row_bm >= start_B[here].unsqueeze(1)) & (row_bm < stop_B[here].unsqueeze(1))
    candidates_bm = candidates_bm.masked_fill(is_own_bm, -torch.inf)
    best_bh = first_largest(candidates_bm, num_others)

    own_row_bp = own_row_Bp[here]
    is_own_bp = own_row_bp < num_rows
    own_share_bp = is_own_bp.double() / is_own_bp.sum(dim=1, keepdim=True)
    scaled_own_bp = own_similarity_bp.masked_fill(~is_own_bp, -torch.inf)
    scaled_bn = torch.cat([scaled_own_bp, candidates_bm.gather(1, best_bh)], dim=1) / memory.temperature
    mean_own_b = (own_share_bp * own_similarity_bp).sum(dim=1) / memory.temperature
    weight_b = world_size / (camids_B[here].unsqueeze(1) == camids_B).sum(dim=1).double()
    loss = (weight_b * (scaled_bn.logsumexp(dim=1) - mean_own_b)).sum()

    # Every rank adds the terms of its own rows to all gradients; each rank receives the sum of its own.
    softmax_bn = scaled_bn.softmax(dim=1)
    softmax_bn[:, :most_own] -= own_share_bp
    coefficient_bn = softmax_bn * (weight_b / memory.temperature).unsqueeze(1)
    row_bn = torch.cat([own_row_bp, row_bm.gather(1, best_bh)], dim=1)
    gathered = distributed.all_gather_rows(torch.cat([coefficient_bn, row_bn.double()], dim=1))
    coefficient_Bn, row_Bn = gathered.tensor_split(2, dim=1)
    gradient_BD = torch.zeros_like(features_BD)
    memory.subtract_rows_(gradient_BD, row_Bn.long(), -coefficient_Bn)
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD)
    return loss.to(gradient_bD.dtype), gradient_bD


def _check_ranges(start_B: Tensor, stop_B: Tensor, most_own: int, num_rows: int) -> None:
    """Every rank sees the same ranges, so all raise alike, or none."""
    good_B = (start_B >= 0) & (start_B < stop_B) & (stop_B <= num_rows) & (stop_B - start_B <= most_own)
    if start_B.device.type != "cpu":
        torch._assert_async(good_B.all(), f"proxies: a range is not 1 to {most_own} of the {num_rows} rows")
    elif not good_B.all():
        bad = torch.stack([start_B, stop_B], dim=1)[~good_B][0].tolist()
        raise UserError(
            f"proxies: the range {bad} of a picture's own is not 1 to {most_own} of the {num_rows} rows",
            on_all_ranks=True,
        )
