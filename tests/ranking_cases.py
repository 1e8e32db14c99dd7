"""Random ranking problems and two oracles for them: scikit-learn for the areas, a sort for CMC and mINP."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve


@dataclass
class Case:
    """Arguments of `evaluate_ranking`, in its order."""

    query_features: torch.Tensor
    query_pids: torch.Tensor
    query_camids: torch.Tensor | None
    gallery_features: torch.Tensor
    gallery_pids: torch.Tensor
    gallery_camids: torch.Tensor | None

    @property
    def args(self) -> tuple:
        return tuple(vars(self).values())


def random_case(seed: int, *, num_queries: int | None = None, num_gallery: int | None = None) -> Case:
    """A small problem with junk, distractors (pid 0), cameras without pictures and queries without a match.

    Even seeds: features of small integers, so that many distances are equal and every product is exact. Odd seeds:
    Gaussian features, with some gallery pictures in the gallery twice.
    """
    random = np.random.default_rng(seed)
    num_queries = num_queries or int(random.integers(1, 12))
    num_gallery = num_gallery or int(random.integers(5, 60))
    dim, num_pids = int(random.integers(1, 9)), int(random.integers(1, 8))
    query_pids = random.integers(1, num_pids + 1, num_queries)
    gallery_pids = random.integers(0, num_pids + 2, num_gallery)
    gallery_pids[0] = query_pids[0]  # with the two camids below: one query at least has a match
    cameras = random.choice(20, size=int(random.integers(2, 5)), replace=False)
    query_camids = random.choice(cameras[: int(random.integers(1, len(cameras) + 1))], num_queries)
    gallery_camids = random.choice(cameras, num_gallery)
    gallery_camids[0] = cameras[0] if query_camids[0] != cameras[0] else cameras[1]
    if seed % 2 == 0:
        features = random.integers(-2, 3, (num_queries + num_gallery, dim)).astype(np.float32)
    else:
        centres = random.normal(size=(num_pids + 2, dim))
        pids = np.concatenate([query_pids, gallery_pids])
        features = (centres[pids] + random.normal(size=(len(pids), dim))).astype(np.float32)
        copies = random.integers(0, num_gallery, (2, num_gallery // 4))
        features[num_queries + copies[0]] = features[num_queries + copies[1]]
    return Case(
        torch.from_numpy(features[:num_queries]),
        torch.from_numpy(query_pids),
        torch.from_numpy(query_camids),
        torch.from_numpy(features[num_queries:]),
        torch.from_numpy(gallery_pids),
        torch.from_numpy(gallery_camids),
    )


def clustered_case(seed: int, num_queries: int, num_gallery: int, dim: int, *, num_cameras: int = 4) -> Case:
    """Normalised features around one centre a person, shifted by the camera: true matches all over the ranking."""
    random = np.random.default_rng(seed)
    num_pids = max(2, num_gallery // 12)
    pids = random.integers(1, num_pids + 1, num_queries + num_gallery)
    camids = random.integers(0, num_cameras, len(pids))
    centres, shifts = random.normal(size=(num_pids + 1, dim)), random.normal(size=(num_cameras, dim))
    features = centres[pids] + 0.5 * shifts[camids] + 1.5 * random.normal(size=(len(pids), dim))
    features = torch.nn.functional.normalize(torch.from_numpy(features)).float()
    labels = torch.from_numpy(pids), torch.from_numpy(camids)
    query, gallery = slice(0, num_queries), slice(num_queries, None)
    return Case(features[query], *(x[query] for x in labels), features[gallery], *(x[gallery] for x in labels))


def kept_pairs(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each query with a true match: the float64 squared distances of the gallery without junk, and who matches."""
    gallery = case.gallery_features.double().numpy()
    pids = case.gallery_pids.numpy()
    for i, query in enumerate(case.query_features.double().numpy()):
        match = pids == case.query_pids[i].item()
        kept = np.ones(len(pids), bool)
        if case.query_camids is not None:
            kept = ~(match & (case.gallery_camids.numpy() == case.query_camids[i].item()))
        if match[kept].any():
            yield ((gallery[kept] - query) ** 2).sum(1), match[kept]


def oracle(case: Case, max_rank: int = 50) -> dict:
    """The metrics by their definitions, in float64, one query at a time."""
    trapezoid, stepwise, inverse_penalty, first_ranks, at_recall = [], [], [], [], []
    for distance, match in kept_pairs(case):
        precision, recall, _ = precision_recall_curve(match, -distance)
        trapezoid.append(auc(recall, precision))
        stepwise.append(average_precision_score(match, -distance))
        ranks = np.flatnonzero(match[np.argsort(distance, kind="stable")]) + 1
        inverse_penalty.append(len(ranks) / ranks[-1])
        first_ranks.append(ranks[0])
        # scikit-learn's last point, recall 0 with precision 1, belongs to no threshold.
        levels = np.linspace(0, 1, 101) - 1e-9
        at_recall.append([precision[:-1][(recall[:-1] >= level) & (recall[:-1] > 0)].max() for level in levels])
    first = np.array(first_ranks)
    return {
        "precision_at_recall": np.mean(at_recall, axis=0),
        "mAP": np.mean(trapezoid),
        "mAP_stepwise": np.mean(stepwise),
        "mINP": np.mean(inverse_penalty),
        "cmc": np.array([(first <= k).mean() for k in range(1, max_rank + 1)]),
        "num_valid_queries": len(first),
    }


def assert_equals_oracle(result, case: Case) -> None:
    expected = oracle(case, max_rank=len(result.cmc))
    assert result.num_valid_queries == expected["num_valid_queries"]
    for name in ("mAP", "mAP_stepwise", "mINP"):
        assert abs(getattr(result, name) - expected[name]) < 1e-9, name
    np.testing.assert_allclose(result.cmc, expected["cmc"], atol=1e-12)
    np.testing.assert_allclose(result.precision_at_recall, expected["precision_at_recall"], atol=1e-9)


def oracle_rate(case: Case, false_positive_rate: float) -> float:
    """The true positive rate at a false positive rate, from scikit-learn's ROC curve over all pairs."""
    distances, matches = (np.concatenate(values) for values in zip(*kept_pairs(case), strict=True))
    false_positive, true_positive, _ = roc_curve(matches, -distances, drop_intermediate=False)
    return true_positive[false_positive <= false_positive_rate].max()


def assert_same(result, other, tolerance: float = 0.0) -> None:
    """Equal in every figure: to the last bit, or to a relative tolerance."""
    for name, value in vars(result).items():
        expected = getattr(other, name)
        if name == "camera_pairs" and value is not None:
            assert_same(value, expected, tolerance)
        elif isinstance(value, np.ndarray | float):
            np.testing.assert_allclose(value, expected, rtol=tolerance, atol=0, equal_nan=True, err_msg=name)
        else:
            assert value == expected, name
