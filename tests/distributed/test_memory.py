"""ExemplarMemory on 1, 2, 3 and 4 ranks against the float64 reference, uneven parts and ranks without rows too."""

import pytest
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.memory import ExemplarMemory
from tests import reference

GLOBAL_BATCH = 12
WORLD_SIZES = [1, 2, 3, 4]
NUM_EXEMPLARS = [3, 13, 200]  # on 4 ranks: one without rows; 4 + 4 + 4 + 1; equal parts


def run(ranks, world_size: int, function, *args) -> None:
    """One rank needs no process group: the memory then works in this very process."""
    if world_size == 1:
        function(*args)
    else:
        ranks(world_size).run(function, *args)


def own_part(global_batch: Tensor) -> Tensor:
    return global_batch.chunk(distributed.world_size())[distributed.rank()]


def unit_rows(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


def indices_with_repeats(num_exemplars: int) -> Tensor:
    indices = torch.randint(num_exemplars, (GLOBAL_BATCH,))
    indices[[5, 11]] = indices[0].clone()
    return indices


def check_steps(num_exemplars: int, num_neighbors: int, dtype: torch.dtype, tolerance: float) -> None:
    """Three steps from zero rows: loss, gradient, neighbours and rows of every step."""
    torch.manual_seed(num_exemplars + num_neighbors)
    dim, world_size = 16, distributed.world_size()
    memory = ExemplarMemory(num_exemplars, dim, dtype=dtype, chunk_bytes=32 * 8 * (dim + GLOBAL_BATCH))
    assert memory.rows.shape == (memory.partition.size(distributed.rank()), dim)
    expected_rows = torch.zeros(num_exemplars, dim, dtype=torch.float64)
    for step, momentum in enumerate([0.0, 0.3, 0.59]):
        features, indices = unit_rows(GLOBAL_BATCH, dim).to(dtype), indices_with_repeats(num_exemplars)
        own_features = own_part(features).clone().requires_grad_()
        loss = memory.loss(own_features, own_part(indices), num_neighbors)
        (2.0 * loss).backward()

        expected, gradient = reference.target_loss(features, indices, expected_rows, num_neighbors=num_neighbors)
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), own_part(expected).mean(), rtol=tolerance, atol=0)
        # The rank's own mean is over b of B rows, so its gradient is W times that of the global mean.
        wanted = 2.0 * world_size * own_part(gradient)
        torch.testing.assert_close(own_features.grad.double(), wanted, rtol=0, atol=20 * tolerance)
        if dtype == torch.float64:
            wanted_neighbors = own_part(reference.neighbors(features, expected_rows, num_neighbors))
            assert torch.equal(memory.latest.neighbors_bk, wanted_neighbors)

        memory.update(own_features.detach(), own_part(indices), momentum)
        expected_rows = reference.update(expected_rows, features, indices, momentum)
        torch.testing.assert_close(memory.full().double(), expected_rows, rtol=0, atol=tolerance)
        assert memory.health()["rows_never_written"] == (expected_rows == 0).all(dim=1).sum(), step


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_equal_the_reference(ranks, world_size: int) -> None:
    for num_exemplars in NUM_EXEMPLARS:
        for num_neighbors in (0, min(6, num_exemplars)):
            run(ranks, world_size, check_steps, num_exemplars, num_neighbors, torch.float64, 1e-12)
            run(ranks, world_size, check_steps, num_exemplars, num_neighbors, torch.float32, 2e-6)


def half_precision_run(dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """All rows after three steps, and the global mean loss of each."""
    torch.manual_seed(0)
    memory, losses = ExemplarMemory(40, 16, dtype=dtype, chunk_bytes=4096), []
    for momentum in (0.0, 0.3, 0.59):
        features, indices = unit_rows(GLOBAL_BATCH, 16).float(), indices_with_repeats(40)
        loss = memory.loss(own_part(features), own_part(indices), 6)
        losses.append(distributed.all_reduce(loss / distributed.world_size()).item())
        memory.update(own_part(features), own_part(indices), momentum)
    return memory.full(), losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_do_not_depend_on_the_ranks(ranks, dtype: torch.dtype) -> None:
    """The rounding of rows is drawn for the global batch: rows are equal to the last bit on any number of ranks."""
    rows, losses = half_precision_run(dtype)
    for world_size in WORLD_SIZES[1:]:
        for rank_rows, rank_losses in ranks(world_size).run(half_precision_run, dtype):
            assert torch.equal(rank_rows, rows)
            assert rank_losses == pytest.approx(losses, rel=1e-6)
    exact, exact_losses = half_precision_run(torch.float32)
    spacing = torch.finfo(dtype).eps
    assert (rows.float() - exact).abs().max() <= spacing / (1.0 - 0.59)
    assert losses == pytest.approx(exact_losses, rel=20 * spacing)


def check_ties(num_exemplars: int, num_neighbors: int) -> None:
    """Small integers make exact products with many equals, at the k-th place, across chunks and across ranks."""
    torch.manual_seed(num_exemplars)
    rows = torch.randint(-1, 2, (num_exemplars, 4)).float()
    features = torch.randint(-1, 2, (GLOBAL_BATCH, 4)).float()
    indices = torch.randint(num_exemplars, (GLOBAL_BATCH,))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for chunk_bytes in (1, 2**20):
            memory = ExemplarMemory(num_exemplars, 4, dtype=dtype, chunk_bytes=chunk_bytes)
            memory.load_full(rows.to(dtype))
            memory.loss(own_part(features), own_part(indices), num_neighbors)
            assert torch.equal(memory.latest.neighbors_bk, own_part(reference.neighbors(features, rows, num_neighbors)))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equal_similarities_go_to_the_lower_row(ranks, world_size: int) -> None:
    for num_exemplars, num_neighbors in ((7, 7), (50, 6), (500, 40)):
        run(ranks, world_size, check_ties, num_exemplars, num_neighbors)


def check_zero_rows_give_lowest_indices() -> None:
    memory = ExemplarMemory(40, 8)
    memory.loss(torch.ones(GLOBAL_BATCH // distributed.world_size(), 8), own_part(torch.arange(GLOBAL_BATCH)), 6)
    assert (memory.latest.neighbors_bk == torch.arange(6)).all()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_untrained_memory_has_the_lowest_indices_as_neighbours(ranks, world_size: int) -> None:
    run(ranks, world_size, check_zero_rows_give_lowest_indices)


def check_refused_steps() -> None:
    torch.manual_seed(0)
    last = distributed.rank() == distributed.world_size() - 1
    memory = ExemplarMemory(13, 8)
    features, indices = unit_rows(GLOBAL_BATCH, 8).float(), indices_with_repeats(13)
    memory.update(own_part(features), own_part(indices), 0.0)
    before, health = memory.full(), memory.health()
    assert before.any()

    other = own_part(unit_rows(GLOBAL_BATCH, 8).float())
    for poison in (torch.nan, torch.inf, -torch.inf, 1e30):  # the last is finite, its norm is not
        poisoned = other.clone()
        if last:
            poisoned[0, 3] = poison
        memory.update(poisoned, own_part(indices), 0.5)
        assert torch.equal(memory.full(), before)
    memory.update(other, own_part(indices), 0.5, skip=last)
    memory.update(other, own_part(indices), 0.5, skip=torch.tensor(float(last)))
    assert torch.equal(memory.full(), before)
    after = memory.health()
    assert after["steps_not_finite"] == 4
    assert after["steps_skipped"] == 2
    assert after["rows_never_written"] == health["rows_never_written"] > 0
    assert after["mean_staleness"] == 6.0

    memory.update(other, own_part(indices), 0.5)
    assert not torch.equal(memory.full(), before)
    assert memory.full().isfinite().all()
    assert memory.health()["mean_staleness"] == 0.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_refused_step_changes_no_row_on_any_rank(ranks, world_size: int) -> None:
    run(ranks, world_size, check_refused_steps)


def check_gathered_once() -> None:
    torch.manual_seed(0)
    rows, features, indices = unit_rows(40, 8), unit_rows(GLOBAL_BATCH, 8), torch.arange(GLOBAL_BATCH)
    losses, updated, sent = [], [], []
    for gathers_once in (False, True):
        memory = ExemplarMemory(40, 8, dtype=torch.float64)
        memory.load_full(rows)
        own = own_part(features).clone().requires_grad_()
        with distributed.count_traffic() as traffic:
            if gathers_once:
                batch = memory.gather(own, own_part(indices))
                loss = batch.loss(3)
                batch.update(0.2)
            else:
                loss = memory.loss(own, own_part(indices), 3)
                memory.update(own, own_part(indices), 0.2)
        loss.backward()
        losses.append(torch.cat([loss.detach()[None], own.grad.flatten()]))
        updated.append(memory.full())
        sent.append(traffic["all_gather"])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(updated[0], updated[1])
    gather_bytes = len(own_part(features)) * (8 * 8 + 8) if distributed.world_size() > 1 else 0
    assert sent[0] - sent[1] == gather_bytes


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_gathered_ahead_gives_the_same(ranks, world_size: int) -> None:
    run(ranks, world_size, check_gathered_once)


def bytes_sent(num_exemplars: int) -> dict[str, int]:
    """By one step on 2 ranks that gathers twice: in loss and in update."""
    memory = ExemplarMemory(num_exemplars, 32)
    features, indices = torch.randn(GLOBAL_BATCH // 2, 32), torch.arange(GLOBAL_BATCH // 2)
    with distributed.count_traffic() as traffic:
        memory.loss(features, indices, 6)
        memory.update(features, indices, 0.1)
    return dict(traffic)


def test_traffic_does_not_grow_with_the_memory(ranks) -> None:
    small, large = ranks(2).run(bytes_sent, 20), ranks(2).run(bytes_sent, 20_000)
    assert small == large
    half, batch, dim, k = GLOBAL_BATCH // 2, GLOBAL_BATCH, 32, 6
    assert small[0] == {
        "all_gather": 2 * half * (4 * dim + 8) + half * 8 * (1 + k),  # features and indices twice; what was combined
        "all_to_all": batch * 8 * (3 + 2 * k),
        "reduce_scatter": batch * 4 * dim,
        "all_reduce": 4,
    }


def check_state_moves() -> None:
    """Rows saved by parts and loaded by parts are the same memory, updates counted on."""
    torch.manual_seed(0)
    indices = torch.arange(GLOBAL_BATCH)
    memory, copy = ExemplarMemory(13, 8), ExemplarMemory(13, 8)
    memory.update(own_part(unit_rows(GLOBAL_BATCH, 8).float()), own_part(indices), 0.0)
    memory.update(own_part(unit_rows(GLOBAL_BATCH, 8).float()), own_part(indices), 0.0, skip=True)
    state = {name: tensor.clone() for name, tensor in memory.state().items()}
    for name in ("rows", "written"):
        assert len(state[name]) == 13
        assert len(distributed.own_part(state[name])) == memory.partition.size(distributed.rank()), name
    copy.load_state(state)
    assert torch.equal(copy.full(), memory.full())
    assert copy.health() == memory.health()
    assert copy.health()["mean_staleness"] == 1.0
    assert copy.health()["steps_skipped"] == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_moves(ranks, world_size: int) -> None:
    run(ranks, world_size, check_state_moves)
