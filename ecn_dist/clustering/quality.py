"""How good clusters are, where more is known of the pictures. Diagnostics: nothing here reaches training.

n pictures, C clusters, P identities.
"""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.special import entr, gammaln


def adjusted_mutual_information(labels_n: np.ndarray, pids_n: np.ndarray) -> float:
    """AMI of two partitions (Vinh et al. 2010), normalised by the mean of the entropies, as scikit-learn's default.

    1 where they are the same, about 0 where they have nothing to do with each other. As much time as there are pairs
    of cluster sizes that differ, times their members.
    """
    n = len(labels_n)
    _, rows = np.unique(labels_n, return_inverse=True)
    _, columns = np.unique(pids_n, return_inverse=True)
    sizes_C, sizes_P = np.bincount(rows), np.bincount(columns)
    if len(sizes_C) == len(sizes_P) and (n == 0 or len(sizes_C) in (1, n)):
        return 1.0  # all in one, or each alone, in both
    table = coo_matrix((np.ones(n), (rows, columns))).tocsr().tocoo()  # sums what stands in one place
    information = (table.data / n * np.log(n * table.data / (sizes_C[table.row] * sizes_P[table.col]))).sum()
    expected = _expected_information(n, sizes_C, sizes_P)
    gap = (entr(sizes_C / n).sum() + entr(sizes_P / n).sum()) / 2 - expected
    tiny = np.finfo(float).eps
    return float((information - expected) / (min(gap, -tiny) if gap < 0 else max(gap, tiny)))


def _expected_information(n: int, sizes_C: np.ndarray, sizes_P: np.ndarray) -> float:
    """Mean mutual information of partitions of these sizes drawn at random, by the hypergeometric distribution."""
    expected = 0.0
    for a, times_a in zip(*np.unique(sizes_C, return_counts=True), strict=True):
        for b, times_b in zip(*np.unique(sizes_P, return_counts=True), strict=True):
            common = np.arange(max(1, a + b - n), min(a, b) + 1)
            chosen = gammaln([a + 1, b + 1, n - a + 1, n - b + 1]).sum() - gammaln(n + 1)
            apart = gammaln(a - common + 1) + gammaln(b - common + 1) + gammaln(n - a - b + common + 1)
            probability = np.exp(chosen - gammaln(common + 1) - apart)
            expected += times_a * times_b * (common / n * np.log(n * common / (a * b)) * probability).sum()
    return expected


def cluster_figures(labels_N: np.ndarray, camids_N: np.ndarray, pids_N: np.ndarray | None = None) -> dict[str, float]:
    """Figures on clusters (labels: -1 outside of them), named as in metrics.jsonl.

    AMI only where identities are given (-1: unknown), and over the clustered pictures that have one.
    """
    inside = labels_N >= 0
    sizes = np.bincount(labels_N[inside])
    figures: dict[str, float] = {
        "clusters": len(sizes),
        "outliers": int((~inside).sum()),
        "cluster_size_mean": float(sizes.mean()) if len(sizes) else 0.0,
        "cluster_size_max": int(sizes.max()) if len(sizes) else 0,
        "cluster_cross_camera": cross_camera_share(labels_N[inside], camids_N[inside]),
    }
    if pids_N is not None:
        known = inside & (pids_N >= 0)
        figures["cluster_ami"] = adjusted_mutual_information(labels_N[known], pids_N[known])
    return figures


def cross_camera_share(labels_n: np.ndarray, camids_n: np.ndarray) -> float:
    """Of the pairs of pictures in one cluster, the share from two cameras; 0 where there is no pair."""
    pairs = int((np.bincount(labels_n) ** 2).sum()) - len(labels_n)
    if not pairs:
        return 0.0
    _, counts = np.unique(np.stack([labels_n, camids_n]), axis=1, return_counts=True)
    return 1.0 - (int((counts**2).sum()) - len(labels_n)) / pairs
