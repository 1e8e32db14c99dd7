"""FMCL's bank on 1, 2 and 3 ranks against the float64 reference: from an empty bank to one that is half written."""

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from tests import reference
from tests.distributed.test_memory import GLOBAL_BATCH, indices_with_repeats, own_part, run, unit_rows


def check_steps(num_rows: int, num_neighbors: int, dtype: torch.dtype, tolerance: float) -> None:
    """Each step: the loss against a bank in which some rows were never written, then the positives become rows."""
    torch.manual_seed(num_rows + num_neighbors)
    chunk_bytes = 32 * 8 * (16 + GLOBAL_BATCH)
    memory = ExemplarMemory(num_rows, 16, temperature=0.07, dtype=dtype, chunk_bytes=chunk_bytes)
    rows = torch.zeros(num_rows, 16, dtype=torch.float64)
    for _ in range(3):
        features, positives = unit_rows(GLOBAL_BATCH, 16).to(dtype), unit_rows(GLOBAL_BATCH, 16).to(dtype)
        indices = indices_with_repeats(num_rows)
        own_features = own_part(features).clone().requires_grad_()
        loss = memory.gather(own_features, own_part(indices)).bank_loss(own_part(positives), num_neighbors)
        (2.0 * loss).backward()
        wanted, gradient = reference.bank_loss(
            features, indices, positives, rows, rows.any(dim=1), num_neighbors=num_neighbors
        )
        torch.testing.assert_close(loss.double(), own_part(wanted).mean(), rtol=tolerance, atol=tolerance)
        wanted_gradient = 2.0 * distributed.world_size() * own_part(gradient)
        torch.testing.assert_close(own_features.grad.double(), wanted_gradient, rtol=0, atol=50 * tolerance)
        memory.gather(own_part(positives), own_part(indices)).update(0.0)
        rows = reference.update(rows, positives, indices, 0.0)
        memory.health()
        torch.testing.assert_close(memory.full().double(), rows, rtol=0, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_equal_the_reference(ranks, world_size: int) -> None:
    """Neighbours of all counts: none, fewer rows than neighbours, a rank without rows."""
    for num_rows, num_neighbors in ((200, 0), (200, 18), (13, 13), (1, 1), (4, 3)):
        run(ranks, world_size, check_steps, num_rows, num_neighbors, torch.float64, 1e-12)
        run(ranks, world_size, check_steps, num_rows, num_neighbors, torch.float32, 5e-6)


def test_positives_must_fit() -> None:
    batch = ExemplarMemory(5, 4).gather(torch.zeros(2, 4), torch.arange(2))
    with pytest.raises(UserError, match=r"positives \(3, 4\) for features \(2, 4\)"):
        batch.bank_loss(torch.zeros(3, 4))
    with pytest.raises(UserError, match="num_neighbors: 6"):
        batch.bank_loss(torch.zeros(2, 4), 6)
