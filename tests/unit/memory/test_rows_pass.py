"""The one pass over memory rows, against the whole matrix at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ecn_dist.memory.rows_pass import GROUP, first_largest, rows_per_chunk, summarize_rows
from tests import reference


def unit_rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=1).to(dtype)


@pytest.mark.parametrize("num_rows", [1, GROUP - 1, GROUP, 5 * GROUP + 3, 700])
@pytest.mark.parametrize("num_neighbors", [0, 1, 6])
@pytest.mark.parametrize("chunk_rows", [GROUP, 4 * GROUP, 10**6])
def test_summary_equals_the_whole_matrix(num_rows: int, num_neighbors: int, chunk_rows: int) -> None:
    torch.manual_seed(num_rows)
    temperature, features, rows = 0.05, 1.4 * unit_rows(9, 16), unit_rows(num_rows, 16)
    summary = summarize_rows(
        features, rows, temperature=temperature, num_neighbors=num_neighbors, chunk_bytes=chunk_rows * (16 + 9) * 8
    )
    similarity = features @ rows.T
    maximum = similarity.amax(dim=1)
    weight = torch.exp((similarity - maximum[:, None]) / temperature)
    torch.testing.assert_close(summary.maximum_B, maximum)
    torch.testing.assert_close(summary.normalizer_B, weight.sum(dim=1))
    torch.testing.assert_close(summary.weighted_sum_BD, weight @ rows)
    found = min(num_neighbors, num_rows)
    expected = reference.neighbors(features, rows, num_neighbors)
    assert torch.equal(summary.top_row_Bk[:, :found], expected)
    torch.testing.assert_close(summary.top_similarity_Bk[:, :found], similarity.gather(1, expected))
    assert (summary.top_row_Bk[:, found:] == num_rows).all()
    assert (summary.top_similarity_Bk[:, found:] == -torch.inf).all()


def test_rising_similarities_of_any_size_stay_finite() -> None:
    """Each chunk's maximum lies far above the one before, and exp of a similarity would overflow."""
    rows = torch.linspace(0.0, 500.0, 8 * GROUP)[:, None] * torch.tensor([[1.0, 0.0]])
    features = torch.tensor([[100.0, 1.0], [-100.0, 1.0]])
    summary = summarize_rows(features, rows, temperature=0.05, num_neighbors=0, chunk_bytes=GROUP * 16)
    torch.testing.assert_close(summary.normalizer_B, torch.ones(2))
    torch.testing.assert_close(summary.weighted_sum_BD, torch.tensor([[500.0, 0.0], [0.0, 0.0]]))


def test_first_largest_takes_equals_in_order() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, -torch.inf]])
    assert first_largest(values, 4).tolist() == [[1, 2, 4, 3]]
    assert first_largest(values, 9).tolist() == [[1, 2, 4, 3, 0, 5]]


def test_equals_within_and_across_groups_and_chunks() -> None:
    torch.manual_seed(0)
    for _ in range(30):
        rows = torch.randint(-1, 2, (6 * GROUP + 5, 2)).double()
        features = torch.randint(-1, 2, (4, 2)).double()
        summary = summarize_rows(features, rows, temperature=1.0, num_neighbors=7, chunk_bytes=2 * GROUP * (2 + 4) * 8)
        assert torch.equal(summary.top_row_Bk, reference.neighbors(features, rows, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunk_keeps_to_its_budget(dtype: torch.dtype) -> None:
    rows = torch.zeros(100_000, 64, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chunk = rows_per_chunk(2**20, 128, rows, wide)
    row_bytes = 64 * dtype.itemsize + 128 * wide.itemsize + (64 * wide.itemsize if dtype != wide else 0)
    assert chunk % GROUP == 0
    assert 2**20 - GROUP * row_bytes < chunk * row_bytes <= 2**20
    assert rows_per_chunk(1, 128, rows, wide) == GROUP
    assert rows_per_chunk(2**40, 128, rows[:40], wide) == 2 * GROUP


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_grows_with_the_rows() -> None:
    largest = []
    for num_rows in (1_000, 50_000):
        rows, features = unit_rows(num_rows, 8, dtype=torch.float32), unit_rows(16, 8, dtype=torch.float32)
        with LargestTensor() as watch:
            summarize_rows(features, rows, temperature=0.05, num_neighbors=6, chunk_bytes=2**14)
        largest.append(watch.numel)
    assert largest[0] == largest[1] < 16 * 1_000
