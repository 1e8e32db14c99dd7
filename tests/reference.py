"""METHOD.md's target loss and memory update, as plainly as they can be written: float64, one process, loops."""

import torch
from torch import Tensor


def nearest_rows(similarities: list[float], num_neighbors: int) -> list[int]:
    """The rows with the largest similarities, largest first, equals by the lower row."""
    return sorted(range(len(similarities)), key=lambda j: (-similarities[j], j))[:num_neighbors]


def neighbors(features: Tensor, rows: Tensor, num_neighbors: int) -> Tensor:
    """(B, k): the rows nearest to each feature."""
    similarity = (features.double() @ rows.double().T).tolist()
    return torch.tensor([nearest_rows(line, num_neighbors) for line in similarity], dtype=torch.int64)


def weights(features: Tensor, indices: Tensor, rows: Tensor, num_neighbors: int) -> Tensor:
    """w of METHOD.md, (B, N): 1/k at the k nearest rows, then exactly 1 at the own row."""
    result = torch.zeros(len(features), len(rows), dtype=torch.float64)
    for i, nearest in enumerate(neighbors(features, rows, num_neighbors).tolist()):
        for j in nearest:
            result[i, j] = 1.0 / num_neighbors
        result[i, indices[i]] = 1.0
    return result


def target_loss(
    features: Tensor, indices: Tensor, rows: Tensor, *, temperature: float = 0.05, num_neighbors: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss of each batch row (B,), and the gradient of their mean with respect to the features (B, D)."""
    features = features.detach().double().requires_grad_()
    rows = rows.double()
    log_p = torch.log_softmax(features @ rows.T / temperature, dim=1)
    losses = -(weights(features.detach(), indices, rows, num_neighbors) * log_p).sum(dim=1)
    (gradient,) = torch.autograd.grad(losses.mean(), features)
    return losses.detach(), gradient


def update(rows: Tensor, features: Tensor, indices: Tensor, momentum: float) -> Tensor:
    """The rows after one step, one batch row after the other."""
    rows = rows.double().clone()
    for feature, index in zip(features.double(), indices.tolist(), strict=True):
        row = momentum * rows[index] + (1.0 - momentum) * feature
        length = row.norm()
        rows[index] = row / length if length > 0 else row
    return rows
