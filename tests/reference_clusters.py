"""Clusters by their dense definition in float64, one picture at a time, and the cases that they are held against.

Letters: N pictures, D feature length.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor

MARGIN = 1e-7


@dataclass
class Case:
    """Features (N, D) of unit length, camids (N,), and options of `find_clusters`."""

    features: Tensor
    camids: Tensor
    options: dict = field(default_factory=dict)

    def kwargs(self, camera_aware: bool) -> dict:
        return self.options | ({"camids": self.camids} if camera_aware else {})


def random_case(seed: int) -> Case:
    """People of many or few pictures, isolated pictures, copies, one camera or several, at times k1 above N."""
    random = np.random.default_rng(seed)
    num_people, dim = int(random.integers(1, 9)), int(random.choice([2, 5, 16, 40]))
    people = np.repeat(np.arange(num_people), random.integers(1, 14, num_people))
    people = np.concatenate([people, np.arange(num_people, num_people + random.integers(0, 8))])
    camids = random.choice(7, size=int(random.choice([1, 2, 4])), replace=False)
    camids = random.choice(camids, len(people))
    centres, shifts = random.normal(size=(people.max() + 1, dim)), random.normal(size=(7, dim))
    features = (
        centres[people] + 0.3 * shifts[camids] + random.uniform(0.1, 0.8) * random.normal(size=(len(people), dim))
    )
    if seed % 2:  # copies: of some pictures, or of one by the dozen
        of = random.integers(0, len(people), (2, len(people) // 3))
        features[of[0]] = features[of[1]] if seed % 4 == 1 else features[of[1, :1]]
    order = random.permutation(len(people))
    features = torch.nn.functional.normalize(torch.from_numpy(features[order]).float())
    k1 = int(random.integers(1, 20)) if seed % 5 else 60
    k1_intra, k1_inter = int(random.integers(1, 8)), int(random.integers(1, 12))
    options = {
        "k1": k1,
        "k2": int(random.integers(1, min(k1, 7) + 1)),
        "eps": float(random.choice([0.3, 0.5, 0.6, 0.75])),
        "min_samples": int(random.integers(1, 6)),
        "k1_intra": k1_intra,
        "k1_inter": k1_inter,
        "k2_intra": int(random.integers(1, k1_intra + 2)),
        "k2_inter": int(random.integers(0, k1_inter + 1)),
    }
    return Case(features, torch.from_numpy(camids[order]), options)


def squared_distances(features: Tensor) -> np.ndarray:
    """(N, N): max(0, 2 - 2 f.g), every dot product summed up in the same order."""
    f = features.double().numpy()
    return np.stack([np.maximum(0.0, 2.0 - 2.0 * (f * row).sum(axis=1)) for row in f])


def dense_jaccard(
    features: Tensor,
    k1: int = 30,
    k2: int = 6,
    camids: Tensor | None = None,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 2,
    k2_inter: int = 4,
    **_: float,
) -> np.ndarray:
    """(N, N) Jaccard distances."""
    distances = squared_distances(features)
    size = len(distances)

    def ranked(of: int, among: np.ndarray) -> list[int]:
        return sorted(np.flatnonzero(among), key=lambda other: (other != of, distances[of, other], other))

    def reciprocal(ranks: list[list[int]]) -> list[set[int]]:
        return [{j for j in rank if i in ranks[j]} for i, rank in enumerate(ranks)]

    if camids is None:
        everything = np.ones(size, bool)
        rank = [ranked(i, everything)[:k1] for i in range(size)]
        core = reciprocal(rank)
        half = reciprocal([one[: round(k1 / 2) + 1] for one in rank])
        members = [near.union(*(half[j] for j in near if 3 * len(half[j] & near) > 2 * len(half[j]))) for near in core]
        heads = [one[:k2] for one in rank]
    else:
        cameras = camids.numpy()
        intra = [ranked(i, cameras == cameras[i])[: k1_intra + 1] for i in range(size)]
        inter = [ranked(i, cameras != cameras[i])[:k1_inter] for i in range(size)]
        members = [a | b for a, b in zip(reciprocal(intra), reciprocal(inter), strict=True)]
        heads = [a[:k2_intra] + b[:k2_inter] for a, b in zip(intra, inter, strict=True)]
    weights = np.zeros((size, size))
    for i, near in enumerate(map(sorted, members)):
        weights[i, near] = np.exp(-distances[i, near])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[head].mean(axis=0) for head in heads])
    overlap = np.stack([np.minimum(row, weights).sum(axis=1) for row in weights])
    return 1.0 - overlap / (2.0 - overlap)


def dense_clusters(features: Tensor, eps: float = 0.6, min_samples: int = 4, **neighborhoods) -> np.ndarray:
    """(N,) labels of scikit-learn's DBSCAN."""
    jaccard = np.maximum(dense_jaccard(features, **neighborhoods), 0.0)
    return DBSCAN(eps=eps + MARGIN, min_samples=min_samples, metric="precomputed").fit_predict(jaccard)
