"""Query expansion: a query looks again as the mean of itself and what it found.

Shape letters: Q queries, G gallery pictures, D feature length, k neighbours.
"""

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.ranking.inputs import first_of_part
from ecn_dist.ranking.neighbors import MEMORY_BUDGET, nearest_pictures


def expand_queries(
    query_features: Tensor,
    gallery_features: Tensor,
    num_neighbors: int = 5,
    *,
    normalize: bool = True,
    gallery_sharded: bool = False,
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """Average query expansion (Chum et al., ICCV 2007): each query becomes the mean of itself and its nearest pictures.

    Features are (Q, D) and (G, D) floats; returns (Q, D) in the query's type and on its device, for `evaluate_ranking`
    with the same gallery. `normalize` scales the means to length 1, as evaluation features are. Labels are not looked
    at: pictures of the query's own camera count like others. `gallery_sharded`, `device` and `memory_budget` as in
    `evaluate_ranking`. Collectives: gathers of each rank's nearest, a sum of (Q, D).
    """
    if num_neighbors < 1:
        raise UserError(f"query expansion by {num_neighbors} neighbours; at least 1 is needed", on_all_ranks=True)
    _, places = nearest_pictures(
        query_features,
        gallery_features,
        num_neighbors,
        gallery_sharded=gallery_sharded,
        device=device,
        memory_budget=memory_budget,
    )
    query_features, gallery_features = torch.as_tensor(query_features), torch.as_tensor(gallery_features)
    first = first_of_part(len(gallery_features)) if gallery_sharded else 0
    places = places.to(gallery_features.device) - first
    total = torch.zeros(query_features.shape, dtype=torch.float64, device=query_features.device)
    for column in places.unbind(1):  # a neighbour at a time, so that no (Q, k, D) is made
        here = ((column >= 0) & (column < len(gallery_features))).nonzero().squeeze(1)
        found = gallery_features.index_select(0, column[here]).to(total)
        total.index_add_(0, here.to(total.device), found)
    if gallery_sharded:
        total = distributed.all_reduce(total)
    mean = (total + query_features) / (1 + places.shape[1])
    if normalize:
        mean = torch.nn.functional.normalize(mean)
    return mean.to(query_features.dtype)
