"""ExemplarMemory on an accelerator: the CPU's results, and a step that never waits for the device."""

import pytest
import torch

from ecn_dist.memory import ExemplarMemory
from tests import reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]


def unit_rows(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=1)


def memory_on_accelerator(num_exemplars: int, dim: int, dtype: torch.dtype, backend: str) -> ExemplarMemory:
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("the Triton kernels take half-precision rows")
    device = torch.accelerator.current_accelerator()
    memory = ExemplarMemory(num_exemplars, dim, device=device, dtype=dtype, chunk_bytes=2**20, backend=backend)
    memory.load_full(unit_rows(num_exemplars, dim).to(device, dtype))
    return memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_equals_the_reference(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    memory = memory_on_accelerator(3000, 256, dtype, backend)
    rows = memory.full().cpu()
    features, indices = unit_rows(24, 256).to(dtype).float(), torch.randint(3000, (24,))
    indices[[5, 11]] = indices[0].clone()
    on_device = features.to(memory.rows.device).requires_grad_()
    loss = memory.loss(on_device, indices.to(on_device.device), 6)
    loss.backward()
    memory.update(on_device, indices.to(on_device.device), 0.3)

    expected, gradient = reference.target_loss(features, indices, rows, num_neighbors=6)
    precision = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(loss.cpu().double(), expected.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(on_device.grad.cpu().double(), gradient, rtol=0, atol=precision * gradient.abs().max())
    wanted_rows = reference.update(rows, features, indices, 0.3)
    torch.testing.assert_close(memory.full().cpu().double(), wanted_rows, rtol=0, atol=precision)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_does_not_wait_for_the_device(dtype: torch.dtype, backend: str) -> None:
    if torch.accelerator.current_accelerator().type != "cuda":
        pytest.skip("only CUDA tells of synchronisation")
    memory = memory_on_accelerator(3000, 256, dtype, backend)
    features = unit_rows(24, 256).to(memory.rows.device).requires_grad_()
    indices = torch.arange(24, device=memory.rows.device)

    def step() -> None:
        batch = memory.gather(features, indices)
        batch.loss(6).backward()
        batch.update(0.3, skip=torch.zeros((), device=features.device))

    step()  # the first one loads libraries and compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
