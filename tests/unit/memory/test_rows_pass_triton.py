"""The Triton kernels against the PyTorch pass: on an accelerator, or anywhere in Triton's interpreter.

Without an accelerator `make test-triton` runs them. The
interpreter cannot multiply bfloat16 (it takes the bits for integers), so there float16 speaks for both.
"""

import importlib.util
import os

import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.memory.rows_pass import summarize_rows
from tests import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or DEVICE == "cuda"),
    reason="needs triton, and CUDA or TRITON_INTERPRET=1: make test-triton",
)
DTYPES = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="not in Triton's interpreter")),
]


def unit_rows(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_rows", "dim", "num_neighbors", "chunk_rows"),
    [
        (5, 1, 64, 3, 1),  # fewer rows than neighbours
        (16, 300, 128, 6, 128),  # several chunks, the last one shorter
        (20, 700, 192, 6, 10**6),  # one chunk of several tiles
        (130, 500, 64, 0, 256),  # two blocks of the batch, no neighbours
        (7, 129, 64, 130, 128),  # more neighbours than rows
        (33, 1000, 320, 40, 384),
    ],
)
def test_summary_equals_that_of_torch(
    dtype: torch.dtype, batch: int, num_rows: int, dim: int, num_neighbors: int, chunk_rows: int
) -> None:
    from ecn_dist.memory import rows_pass_triton as triton_pass

    torch.manual_seed(0)
    features = (1.4 * unit_rows(batch, dim)).to(dtype).float().to(DEVICE)
    rows = unit_rows(num_rows, dim).to(dtype).to(DEVICE)
    chunk_bytes = chunk_rows * (dim + batch) * dtype.itemsize
    arguments = {"temperature": 0.05, "num_neighbors": num_neighbors}
    found = triton_pass.summarize_rows(features, rows, **arguments, chunk_bytes=chunk_bytes)
    wanted = summarize_rows(features.cpu(), rows.cpu(), **arguments, chunk_bytes=2**20)
    torch.testing.assert_close(found.maximum_B.cpu(), wanted.maximum_B, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.normalizer_B.cpu(), wanted.normalizer_B, rtol=1e-4, atol=0)
    # The softmax weights are rounded to the rows' type, twice.
    found_mean, wanted_mean = (s.weighted_sum_BD.cpu() / s.normalizer_B.cpu()[:, None] for s in (found, wanted))
    assert (found_mean - wanted_mean).norm(dim=1).max() <= 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.top_similarity_Bk.cpu(), wanted.top_similarity_Bk, rtol=1e-5, atol=1e-6)
    assert (found.top_row_Bk.cpu() != wanted.top_row_Bk).sum() <= 0.001 * wanted.top_row_Bk.numel()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_similarities_go_to_the_lower_row(dtype: torch.dtype) -> None:
    from ecn_dist.memory import rows_pass_triton as triton_pass

    torch.manual_seed(0)
    rows, features = torch.zeros(700, 64), torch.zeros(20, 64)
    rows[:, :3], features[:, :3] = torch.randint(-1, 2, (700, 3)), torch.randint(-1, 2, (20, 3))
    for chunk_bytes in (1, 2**20):
        found = triton_pass.summarize_rows(
            features.to(DEVICE), rows.to(DEVICE, dtype), temperature=1.0, num_neighbors=9, chunk_bytes=chunk_bytes
        )
        assert torch.equal(found.top_row_Bk.cpu(), reference.neighbors(features, rows, 9))


@needs_triton
def test_memory_with_triton_equals_the_reference() -> None:
    torch.manual_seed(0)
    memory = ExemplarMemory(300, 64, device=DEVICE, dtype=torch.float16, backend="triton")
    memory.load_full(unit_rows(300, 64).to(DEVICE))
    features = unit_rows(12, 64).half().float().to(DEVICE).requires_grad_()
    indices = torch.randint(300, (12,), device=DEVICE)
    loss = memory.loss(features, indices, 6)
    loss.backward()
    expected, gradient = reference.target_loss(features.cpu(), indices.cpu(), memory.full().cpu(), num_neighbors=6)
    torch.testing.assert_close(loss.cpu().double(), expected.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(features.grad.cpu().double(), gradient, rtol=0, atol=2e-3 * gradient.abs().max().item())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes rows on the CPU")
def test_where_triton_cannot_serve_it_says_so() -> None:
    with pytest.raises(UserError, match="on the CPU; use torch"):
        ExemplarMemory(10, 64, device="cpu", dtype=torch.bfloat16, backend="triton")
    with pytest.raises(UserError, match="'cuda'; use torch or triton"):
        ExemplarMemory(10, 64, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere the device is refused first")
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.float16, 63)])
def test_rows_triton_does_not_take(dtype: torch.dtype, dim: int) -> None:
    with pytest.raises(UserError, match="a length that 64 divides"):
        ExemplarMemory(10, dim, dtype=dtype, backend="triton")
