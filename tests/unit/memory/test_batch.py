"""The update of rows: order of repeats, rounding of half-precision rows, small steps."""

import pytest
import torch

from ecn_dist.memory import ExemplarMemory
from ecn_dist.memory.batch import occurrence_number, round_stochastically
from tests import reference

HALF = [torch.bfloat16, torch.float16]


def test_occurrence_number() -> None:
    values = torch.tensor([5, 2, 5, 5, 0, 2])
    assert occurrence_number(values).tolist() == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("repeats", [1, 2, 9])
@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.59, 0.999])
def test_repeated_indices_apply_in_batch_order(repeats: int, momentum: float) -> None:
    torch.manual_seed(repeats)
    features = torch.randn(3 * repeats, 8, dtype=torch.float64)
    indices = torch.tensor([4, 1, 7] * repeats)[torch.randperm(3 * repeats)]
    rows = torch.nn.functional.normalize(torch.randn(9, 8, dtype=torch.float64), dim=1)
    memory = ExemplarMemory(9, 8, dtype=torch.float64)
    memory.load_full(rows)
    memory.update(features, indices, momentum)
    torch.testing.assert_close(memory.full(), reference.update(rows, features, indices, momentum), rtol=0, atol=1e-14)
    if repeats > 1 and momentum:
        backwards = reference.update(rows, features.flip(0), indices.flip(0), momentum)
        assert not torch.allclose(memory.full(), backwards, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_row_that_comes_out_as_zero_stays_zero(dtype: torch.dtype) -> None:
    memory = ExemplarMemory(3, 4, dtype=dtype)
    memory.update(torch.zeros(2, 4), torch.tensor([0, 2]), 0.5)
    assert (memory.full() == 0).all()
    assert memory.health()["rows_never_written"] == 1


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_to_a_neighbour_and_right_on_average(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(50, generator=generator), torch.randn(50, generator=generator) * 1e-5])
    exact = torch.tensor([0.0, 1.0, -0.5, 2.0**-14, 2.0**-24, -3.0])
    noise = torch.rand(4000, 100, generator=generator)
    rounded = round_stochastically(values.expand_as(noise), dtype, noise).float()
    for value, column in zip(values, rounded.T, strict=True):
        nearest = value.to(dtype)
        toward = torch.tensor(torch.inf if nearest.float() < value else -torch.inf, dtype=dtype)
        assert set(column.tolist()) <= {nearest.item(), torch.nextafter(nearest, toward).item()}
    spacing = rounded.amax(dim=0) - rounded.amin(dim=0)
    assert ((rounded.mean(dim=0) - values).abs() <= 0.04 * spacing + 1e-12).all()  # 5 standard errors
    for draw in noise[:100, : len(exact)]:
        assert torch.equal(round_stochastically(exact, dtype, draw), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_are_not_lost(dtype: torch.dtype) -> None:
    """A thousandth of the way each step: rounding to the nearest would stop on the way, these rows do not."""
    torch.manual_seed(0)
    start, goal = torch.nn.functional.normalize(torch.randn(2, 64), dim=1).split(1)
    memories = {rows: ExemplarMemory(1, 64, dtype=rows) for rows in (torch.float32, dtype)}
    nearest = start.to(dtype)
    for memory in memories.values():
        memory.load_full(start.to(memory.rows.dtype))
    for _ in range(1500):
        for memory in memories.values():
            memory.update(goal, torch.tensor([0]), 0.999)
        nearest = torch.nn.functional.normalize(torch.lerp(goal, nearest.float(), 0.999), dim=1).to(dtype)
    wanted, found = (memory.full().float() for memory in memories.values())
    error, error_of_nearest = (1.0 - torch.cosine_similarity(wanted, rows) for rows in (found, nearest.float()))
    assert error < 1e-3
    assert error < 0.1 * error_of_nearest


def test_half_precision_rows_round_by_the_step_alone() -> None:
    """The same steps give the same rows again, and other draws at each step."""
    features = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    history = []
    for _ in range(2):
        memory = ExemplarMemory(4, 32, dtype=torch.bfloat16)
        for _ in range(2):
            memory.update(features, torch.arange(4), 0.0)
            history.append(memory.full())
    assert torch.equal(history[0], history[2])
    assert torch.equal(history[1], history[3])
    assert not torch.equal(history[0], history[1])
