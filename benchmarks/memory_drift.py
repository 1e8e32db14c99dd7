"""How far half-precision rows drift from float32 rows over a training's worth of updates.

The features of each exemplar wander slowly, with noise on every view, as a network's do; every row is updated once an
epoch. Compared with float32 rows that saw the same features: the memory's own stochastic rounding, and what rounding to
the nearest number would give.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecn_dist.memory import ExemplarMemory

NUM_NEIGHBORS = 6
BATCH = 100


def measure(*, exemplars: int = 1000, dim: int = 2048, epochs: int = 60) -> list[dict[str, Any]]:
    """A row for each kind of half precision and each momentum: m = 0.01 epoch as in the paper, and three fixed ones."""
    return [
        _measure(dtype, momentum, exemplars, dim, epochs)
        for dtype in (torch.bfloat16, torch.float16)
        for momentum in (None, 0.9, 0.99, 0.999)
    ]


def _measure(dtype: torch.dtype, momentum: float | None, exemplars: int, dim: int, epochs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random_rows(count: int) -> Tensor:
        return normalize(torch.randn(count, dim, generator=generator), dim=1)

    centre_ND = normalize(random_rows(exemplars) + 2.0 * random_rows(exemplars // 10).repeat(10, 1), dim=1)
    exact, rounded = (ExemplarMemory(exemplars, dim, dtype=kind) for kind in (torch.float32, dtype))
    nearest_ND = torch.zeros(exemplars, dim, dtype=dtype)
    for epoch in range(epochs):
        m = 0.01 * epoch if momentum is None else momentum * (epoch > 0)  # the first sight of an image fills its row
        centre_ND = normalize(centre_ND + 0.1 * random_rows(exemplars), dim=1)
        features_ND = normalize(centre_ND + 0.5 * random_rows(exemplars), dim=1)
        for indices in torch.randperm(exemplars, generator=generator).split(BATCH):
            for memory in (exact, rounded):
                memory.update(features_ND[indices], indices, m)
        nearest_ND = normalize(torch.lerp(features_ND, nearest_ND.float(), m), dim=1).to(dtype)
    queries_BD = normalize(centre_ND[:BATCH] + 0.5 * random_rows(BATCH), dim=1)
    wanted = _neighbors(queries_BD, exact.rows)
    result: dict[str, Any] = {
        "rows": str(dtype).removeprefix("torch."),
        "momentum": "0.01 epoch" if momentum is None else str(momentum),
    }
    for name, rows_ND in (("stochastic", rounded.rows.float()), ("nearest", nearest_ND.float())):
        found = _neighbors(queries_BD, rows_ND)
        same = (found.unsqueeze(2) == wanted.unsqueeze(1)).any(dim=2).float().mean()
        result[f"{name}: 1 - cosine"] = (
            (1.0 - torch.cosine_similarity(rows_ND.double(), exact.rows.double())).mean().item()
        )
        result[f"{name}: neighbours kept"] = same.item()
    return result


def _neighbors(queries_BD: Tensor, rows_ND: Tensor) -> Tensor:
    return (queries_BD @ rows_ND.T).topk(NUM_NEIGHBORS, dim=1).indices
