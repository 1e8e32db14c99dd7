"""ExemplarMemory in one process: row types, autocast, mistakes, health."""

import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from tests import reference


def unit_rows(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=1)


def written_memory(num_exemplars: int, dim: int, dtype: torch.dtype = torch.float32) -> ExemplarMemory:
    memory = ExemplarMemory(num_exemplars, dim, dtype=dtype, chunk_bytes=2**14)
    memory.load_full(unit_rows(num_exemplars, dim).to(dtype))
    return memory


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32_whatever_rows_and_features_are(row_dtype: torch.dtype, feature_dtype: torch.dtype) -> None:
    """Against the reference on the very same rounded rows and features, so only the sums' own rounding is left."""
    torch.manual_seed(0)
    memory = written_memory(500, 64, row_dtype)
    features, indices = (1.4 * unit_rows(16, 64)).to(feature_dtype).requires_grad_(), torch.randint(500, (16,))
    loss = memory.loss(features, indices, 6)
    (1024.0 * loss).backward()  # as a gradient scaler does
    expected, gradient = reference.target_loss(features, indices, memory.full(), num_neighbors=6)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=0)
    assert features.grad.dtype == feature_dtype
    precision = max(torch.finfo(feature_dtype).eps, 1e-5)
    torch.testing.assert_close(features.grad.double() / 1024.0, gradient, rtol=precision, atol=1e-5)


@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_follow_float32_rows(row_dtype: torch.dtype) -> None:
    """Stated bounds: each element within one spacing over 1 - m of its value, loss within 1 %, after 30 steps."""
    torch.manual_seed(0)
    momentum = 0.5
    exact, half = ExemplarMemory(40, 64), ExemplarMemory(40, 64, dtype=row_dtype)
    for _ in range(30):
        features, indices = unit_rows(16, 64), torch.randint(40, (16,))
        for memory in (exact, half):
            memory.update(features, indices, momentum)
    difference = (half.full().float() - exact.full()).abs()
    assert difference.max() <= torch.finfo(row_dtype).eps / (1 - momentum) * exact.full().abs().max()
    torch.testing.assert_close(half.loss(features, indices, 6), exact.loss(features, indices, 6), rtol=0.01, atol=0)


def test_autocast_does_not_reach_the_sums() -> None:
    torch.manual_seed(0)
    memory, features, indices = written_memory(300, 32), unit_rows(8, 32), torch.arange(8)
    plain = memory.loss(features, indices, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory.loss(features, indices, 6), plain)


def test_gradient_reaches_a_network_below() -> None:
    torch.manual_seed(0)
    memory, layer, inputs = written_memory(50, 8), torch.nn.Linear(4, 8), torch.randn(6, 4)
    indices = torch.arange(6)
    memory.loss(torch.nn.functional.normalize(layer(inputs), dim=1), indices, 3).backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    features = torch.nn.functional.normalize(layer(inputs), dim=1)
    _, gradient = reference.target_loss(features, indices, memory.full(), num_neighbors=3)
    features.backward(gradient.float())
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-5)


def test_loss_and_health_leave_the_rows_alone() -> None:
    memory = written_memory(30, 8)
    before = memory.full()
    memory.loss(unit_rows(4, 8), torch.arange(4), 3)
    memory.health()
    assert torch.equal(memory.full(), before)


def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not() -> None:
    memory, features = written_memory(30, 8), unit_rows(4, 8)
    features[2, 3] = torch.nan
    assert not memory.loss(features, torch.arange(4), 3).isfinite()
    memory.set_identities(torch.zeros(30, dtype=torch.int64))
    memory.health()


def test_mistakes_are_named() -> None:
    for arguments, words in [
        ({"num_exemplars": 0, "dim": 4}, "at least 1"),
        ({"num_exemplars": 3, "dim": 4, "temperature": 0.0}, "memory.temperature: 0.0"),
        ({"num_exemplars": 3, "dim": 4, "dtype": torch.int32}, "int32"),
    ]:
        with pytest.raises(UserError, match=words):
            ExemplarMemory(**arguments)
    memory, features, indices = ExemplarMemory(3, 4), torch.ones(2, 4), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"loss.num_neighbors: 4, but the memory has 3 rows"):
        memory.loss(features, indices, 4)
    with pytest.raises(UserError, match=r"\(2, 5\).*wanted \(b, 4\)"):
        memory.loss(torch.ones(2, 5), indices)
    with pytest.raises(UserError, match=r"indices \[3\] are outside 0..2"):
        memory.loss(features, torch.tensor([0, 3]))
    with pytest.raises(UserError, match=r"indices \[-1\] are outside 0..2"):
        memory.update(features, torch.tensor([0, -1]), 0.0)
    for momentum in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"memory.momentum"):
            memory.update(features, indices, momentum)
    with pytest.raises(UserError, match="pids of shape"):
        memory.set_identities(torch.zeros(2))
    assert (memory.full() == 0).all()


def test_health_figures() -> None:
    memory = ExemplarMemory(6, 2)
    assert memory.health() == {
        "rows_never_written": 6,
        "mean_staleness": 0.0,
        "steps_skipped": 0,
        "steps_not_finite": 0,
    }
    for index in (0, 1, 2):
        memory.update(torch.tensor([[1.0, float(index)]]), torch.tensor([index]), 0.0)
    health = memory.health()
    assert health["rows_never_written"] == 3
    assert health["mean_staleness"] == 1.0  # 2, 1 and 0 updates ago

    # Similarities to feature (1, 0): 1, 0.71, 0.45, then zeros; k = 4 takes the rows 0, 1, 2, 3.
    memory.loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 4)
    memory.set_identities(torch.tensor([7, 7, 7, 5, 7, 7]), torch.tensor([0, 0, 1, 1, 1, 1]))
    health = memory.health()
    assert health["own_similarity"] == 1.0
    assert health["neighbor_precision"] == pytest.approx(2 / 3)
    assert health["neighbor_cross_camera"] == 0.5
    memory.set_identities(torch.full((6,), -1))  # identities unknown
    assert "neighbor_precision" not in memory.health()


def test_identities_change_no_loss_gradient_or_row() -> None:
    results = []
    for pids in (None, torch.arange(40) % 5):
        torch.manual_seed(0)
        memory = written_memory(40, 8)
        memory.set_identities(pids, pids)
        for _ in range(3):
            features, indices = unit_rows(8, 8).requires_grad_(), torch.randint(40, (8,))
            loss = memory.loss(features, indices, 4)
            loss.backward()
            memory.health()
            memory.update(features.detach(), indices, 0.3)
        results.append((loss, features.grad, memory.full()))
    for without, with_pids in zip(*results, strict=True):
        assert torch.equal(without, with_pids)
