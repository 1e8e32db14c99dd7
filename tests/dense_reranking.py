"""k-reciprocal re-ranking as its paper defines it, with tables of all pictures by all pictures.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding (CVPR 2017), in float64, one picture at a
time: what re-ranking is held against. Letters: Q queries, G gallery, A = Q + G, D feature length.
"""

import numpy as np
import torch
from torch import Tensor

from ecn_dist.ranking import KReciprocal


def dense_reranking(query: Tensor, gallery: Tensor, settings: KReciprocal) -> np.ndarray:
    """(Q, D) and (G, D) features -> (Q, G) float64 distances. Takes about 24 (Q + G)^2 bytes."""
    features_AD = torch.cat([query, gallery]).double()
    squared = torch.cdist(features_AD, features_AD, compute_mode="donot_use_mm_for_euclid_dist").square_().numpy()
    nearest = np.stack([np.argsort(distances, kind="stable")[: settings.k1 + 1] for distances in squared])
    farthest = squared.max(axis=1, keepdims=True)
    squared /= np.where(farthest > 0, farthest, 1.0)

    def mutual(picture: int, k: int) -> np.ndarray:
        forward = nearest[picture, : k + 1]
        return forward[(nearest[forward, : k + 1] == picture).any(axis=1)]

    half = [mutual(picture, int(np.around(settings.k1 / 2))) for picture in range(len(squared))]
    weights_AA = np.zeros_like(squared)
    for picture, row in enumerate(weights_AA):
        core = mutual(picture, settings.k1)
        near = [half[other] for other in core]
        expanded = [core, *(theirs for theirs in near if len(np.intersect1d(theirs, core)) > 2 / 3 * len(theirs))]
        members = np.unique(np.concatenate(expanded))
        weight = np.exp(-squared[picture, members])
        row[members] = weight / weight.sum()
    if settings.k2 > 1:
        weights_AA = np.stack([weights_AA[others].mean(axis=0) for others in nearest[:, : settings.k2]])

    holders = [np.flatnonzero(column) for column in weights_AA.T]
    result_QG = np.empty((len(query), len(gallery)))
    for picture, distances in enumerate(result_QG):
        overlap = np.zeros(len(squared))
        for member in np.flatnonzero(weights_AA[picture]):
            others = holders[member]
            overlap[others] += np.minimum(weights_AA[picture, member], weights_AA[others, member])
        jaccard = 1.0 - overlap / (2.0 - overlap)
        mixed = (1.0 - settings.distance_weight) * jaccard + settings.distance_weight * squared[picture]
        distances[:] = mixed[len(query) :]
    return result_QG
