"""The camera-proxy loss (METHODS.md: Camera proxies; Wang et al. 2021, "Camera-aware Proxies") on divided rows.

Picture i has its own proxies P_i, one for each camera of its cluster, and H_i, the most similar of the others. With
s_p = x_i . v_p / temperature and n_i pictures of its camera in the global batch:

    loss         = sum_i 1/n_i (log sum_{q in P_i + H_i} exp s_q - mean_{p in P_i} s_p)
    d loss / d x = 1/n_i (sum_q softmax_q v_q - mean_p v_p) / temperature

Between ranks go the features, O(B (|P| + |H|)) numbers, and the gradient; nothing that grows with the rows.

Shape letters: b batch rows here, B on all ranks, D feature length, p own proxies at most, h others, n = p + h, m
candidates for the others.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory.losses import exchange, require
from ecn_dist.memory.rows_pass import keep_largest

if TYPE_CHECKING:
    from ecn_dist.memory.batch import GatheredBatch
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


def proxy_loss(
    memory: "ExemplarMemory", batch: "GatheredBatch", own_b2: Tensor, camids_b: Tensor, most_own: int, num_others: int
) -> tuple[Tensor, Tensor]:
    """This rank's part of the loss times W, and its gradient (b, D). Arguments as `GatheredBatch.proxy_loss`.

    Collective, in order: all-gather of (b, 3) integers, exchange of O(B n) float64 numbers, all-gather of (b, 2 n) of
    them, reduce-scatter of (B, D).
    """
    features_BD, here, num_rows, device = batch.features_BD, batch.here, memory.num_exemplars, memory.rows.device
    about_b3 = torch.cat([own_b2, camids_b.unsqueeze(1)], dim=1).to(device, torch.int64)
    about_B3 = distributed.all_gather_rows(about_b3)
    start_B1, stop_B1, camids_B = about_B3[:, :1], about_B3[:, 1:2], about_B3[:, 2]
    good_B1 = (start_B1 >= 0) & (start_B1 < stop_B1) & (stop_B1 <= num_rows) & (stop_B1 - start_B1 <= most_own)
    require(
        good_B1.squeeze(1),
        about_B3[:, :2],
        lambda bad: f"proxies: the range {bad[0]} of a picture's own is not 1 to {most_own} of the {num_rows} rows",
    )

    # Each rank's nearest rows, so many that enough are left without the picture's own; and the own ones, which are
    # zero on all ranks but the one that holds them. Row number N stands for a free place.
    summary = memory.summarize(features_BD, min(num_others + most_own, num_rows))
    own_row_Bp = start_B1 + torch.arange(most_own, device=device)
    own_row_Bp = torch.where(own_row_Bp < stop_B1, own_row_Bp, num_rows)
    own_similarity_Bp = torch.stack([memory.similarity(row_B, features_BD) for row_B in own_row_Bp.unbind(1)], dim=1)
    own_similarity_Wbp, candidates_bm, row_bm = exchange(memory, summary, own_similarity_Bp)
    is_own_bm = (row_bm >= start_B1[here]) & (row_bm < stop_B1[here])
    others_bh, other_row_bh = keep_largest(candidates_bm.masked_fill(is_own_bm, -torch.inf), row_bm, num_others)

    own_row_bp, own_similarity_bp = own_row_Bp[here], own_similarity_Wbp.sum(dim=0)
    is_own_bp = own_row_bp < num_rows
    own_share_bp = is_own_bp.double() / is_own_bp.sum(dim=1, keepdim=True)
    scaled_bn = torch.cat([own_similarity_bp.masked_fill(~is_own_bp, -torch.inf), others_bh], dim=1)
    scaled_bn = scaled_bn / memory.temperature
    mean_own_b = (own_share_bp * own_similarity_bp).sum(dim=1) / memory.temperature
    weight_b = distributed.world_size() / (camids_B[here].unsqueeze(1) == camids_B).sum(dim=1).double()
    loss = (weight_b * (scaled_bn.logsumexp(dim=1) - mean_own_b)).sum()

    # Every rank adds the terms of its own rows to all gradients; each rank receives the sum of its own.
    softmax_bn = scaled_bn.softmax(dim=1)
    softmax_bn[:, :most_own] -= own_share_bp
    coefficient_bn = softmax_bn * (weight_b / memory.temperature).unsqueeze(1)
    gathered = distributed.all_gather_rows(torch.cat([coefficient_bn, own_row_bp, other_row_bh], dim=1))
    coefficient_Bn, row_Bn = gathered.tensor_split(2, dim=1)
    gradient_BD = torch.zeros_like(features_BD)
    memory.subtract_rows_(gradient_BD, row_Bn.long(), -coefficient_Bn)
    gradient_bD = distributed.reduce_scatter_rows(gradient_BD)
    return loss.to(gradient_bD.dtype), gradient_bD
