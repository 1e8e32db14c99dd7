"""Generalised-mean pooling and the neck against their formulas."""

import pytest
import torch

from ecn_dist.models.layers import GeM, Neck


@pytest.mark.parametrize("p", [1.0, 3.0, 6.5])
def test_gem_is_the_generalised_mean(p: float) -> None:
    values = torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    power = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    wanted = (values.clamp(min=1e-6) ** power).mean((2, 3), keepdim=True) ** (1 / power)
    pool = GeM(p).double()
    found = pool(values)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    found_gradients = torch.autograd.grad((found * weights).sum(), [values, pool.p])
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), [values, power])
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gem_under_autocast_keeps_to_the_range(dtype: torch.dtype) -> None:
    """Cubes of values above 40 are beyond float16, and those of the floor are below it."""
    values = torch.tensor([0.0, 200.0, 3e4, 1e-3]).view(1, 4, 1, 1) * torch.tensor([1.0, 0.5]).view(1, 1, 1, 2)
    pool = GeM(9.0)
    low = values.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        found = pool(low)
    assert found.dtype == dtype
    wanted = (low.detach().double().clamp(min=1e-6) ** 9).mean((2, 3), keepdim=True) ** (1 / 9)
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=2e-6)
    found.float().sum().backward()
    assert low.grad.isfinite().all()
    assert pool.p.grad.isfinite().all()


def test_neck_normalises_and_its_bias_stays() -> None:
    neck = Neck(5)
    features = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + 2
    output = neck(features)
    torch.testing.assert_close(output, (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt())
    output.square().sum().backward()
    assert neck.weight.grad is not None
    assert neck.bias.grad is None
    assert (neck.bias == 0).all()
