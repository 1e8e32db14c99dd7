"""Losses and the memory's updates (formulas.md), written plainly: float64, one process, loops."""

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
    """w of formulas.md, (B, N): 1/k at the k nearest rows, then exactly 1 at the own row."""
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


def hardest_update(rows: Tensor, features: Tensor, indices: Tensor, momentum: float) -> Tensor:
    """The rows after one step in which each row sees the first of its least similar features alone."""
    similarity = (rows.double()[indices] * features.double()).sum(dim=1).tolist()
    positions = [
        min((at for at, other in enumerate(indices.tolist()) if other == index), key=lambda at: (similarity[at], at))
        for index in indices.unique().tolist()
    ]
    return update(rows, features[positions], indices[positions], momentum)


def means(features: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D) the normalised mean of each row's features, zero where it has none."""
    result = torch.zeros(num_rows, features.shape[1], dtype=torch.float64)
    for row in set(row_of.tolist()) - {-1}:
        mean = features.double()[row_of == row].mean(dim=0)
        result[row] = mean / mean.norm()
    return result


def proxy_loss(
    features: Tensor, own: Tensor, camids: Tensor, rows: Tensor, *, temperature: float, num_others: int
) -> tuple[Tensor, Tensor]:
    """The camera-proxy loss of a global batch, a scalar, and its gradient with respect to the features (B, D)."""
    features = features.detach().double().requires_grad_()
    of_cameras: dict[int, list[Tensor]] = {}
    for feature, (start, stop), camid in zip(features, own.tolist(), camids.tolist(), strict=True):
        similarities = rows.double() @ feature
        without_own = [-torch.inf if start <= at < stop else value for at, value in enumerate(similarities.tolist())]
        others = nearest_rows(without_own, min(num_others, len(rows) - (stop - start)))
        log_p = torch.log_softmax(similarities[[*range(start, stop), *others]] / temperature, dim=0)
        of_cameras.setdefault(camid, []).append(-log_p[: stop - start].mean())
    loss = torch.stack([torch.stack(losses).mean() for losses in of_cameras.values()]).sum()
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def bank_loss(
    features: Tensor, indices: Tensor, positives: Tensor, rows: Tensor, written: Tensor, *, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """FMCL's loss of each batch row (B,), and the gradient of their mean with respect to the features (B, D)."""
    features, losses = features.detach().double().requires_grad_(), []
    for feature, index, positive in zip(features, indices.tolist(), positives.double(), strict=True):
        others = [j for j in range(len(rows)) if written[j] and j != index]
        logits = torch.cat([(feature @ positive)[None], rows.double()[others] @ feature]) / 0.07
        nearest = nearest_rows(logits[1:].tolist(), num_neighbors)
        weight = torch.zeros_like(logits.detach())
        weight[0] = 1.0
        if nearest:
            at = torch.tensor(nearest) + 1
            weight[at] = torch.softmax(logits.detach()[at], dim=0)
        losses.append(-(weight * torch.log_softmax(logits, dim=0)).sum())
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), features)
    return torch.stack(losses).detach(), gradient


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """HHL's batch-hard triplet loss: for each anchor the farthest of its label against the nearest of another."""
    terms = []
    for anchor, label in enumerate(labels.tolist()):
        distances = [torch.linalg.vector_norm(embeddings[anchor] - other) for other in embeddings]
        same = labels == label
        positive = max((d for d, s in zip(distances, same, strict=True) if s), key=torch.Tensor.item)
        negative = min((d for d, s in zip(distances, same, strict=True) if not s), key=torch.Tensor.item)
        terms.append(torch.clamp(positive - negative + margin, min=0))
    return torch.stack(terms).mean()
