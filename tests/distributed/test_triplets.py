"""HHL's triplet loss on 1, 2 and 3 ranks against a plain one over the global batch, in float64."""

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.methods.hhl.method import triplet_loss
from tests import reference


def check(margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 7, 7, 8])  # the last is the only one of its label
    embeddings = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = reference.triplet_loss(embeddings, labels, margin)
    expected.backward()
    own = slice(*(12 // distributed.world_size() * (distributed.rank() + at) for at in (0, 1)))
    own_embeddings = embeddings.detach()[own].clone().requires_grad_()
    loss = triplet_loss(own_embeddings, labels[own], margin)
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # Parameters' gradients are averaged over the ranks.
    assert own_embeddings.grad is not None
    gradient = own_embeddings.grad / distributed.world_size()
    torch.testing.assert_close(gradient, 3 * embeddings.grad[own], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_equal_the_reference(ranks, world_size: int) -> None:
    for margin in (0.3, 2.0):
        ranks(world_size).run(check, margin)


def test_equal_embeddings_have_a_finite_gradient() -> None:
    embeddings = torch.ones(4, 3, requires_grad=True)
    triplet_loss(embeddings, torch.tensor([0, 0, 1, 1]), 0.3).backward()
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad, torch.zeros(4, 3))
