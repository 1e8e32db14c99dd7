"""The memory of clusters and camera proxies on 1, 2 and 3 ranks against the float64 reference."""

import pytest
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from tests import reference
from tests.distributed.test_memory import GLOBAL_BATCH, indices_with_repeats, own_part, run, unit_rows

WORLD_SIZES = [1, 2, 3]


def check_means(dtype: torch.dtype, tolerance: float) -> None:
    """Parts of different lengths; pictures of no row, rows without pictures, chunks of one row and of all."""
    rank, world_size = distributed.rank(), distributed.world_size()
    for num_rows in (2, 7, 40):
        torch.manual_seed(num_rows)
        features, row_of = unit_rows(50, 8).to(dtype), torch.randint(-1, num_rows, (50,))
        row_of[row_of == 1] = 0  # row 1 has none
        part = slice(30 if rank else 0, 50 if rank == world_size - 1 else 30)
        for chunk_bytes in (1, 500, None):
            memory = ExemplarMemory(num_rows, 8, dtype=dtype, chunk_bytes=chunk_bytes)
            memory.load_full(unit_rows(num_rows, 8).to(dtype))
            memory.load_means(features[part], row_of[part])
            wanted = reference.means(features, row_of, num_rows)
            torch.testing.assert_close(memory.full().double(), wanted, rtol=0, atol=tolerance)
            assert memory.health()["rows_never_written"] == (wanted == 0).all(dim=1).sum() > 0


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_are_the_means_of_their_members(ranks, world_size: int) -> None:
    run(ranks, world_size, check_means, torch.float64, 1e-14)
    run(ranks, world_size, check_means, torch.float32, 1e-6)


def check_cluster_steps(hardest: bool) -> None:
    """Steps of the cluster loss (a plain cross entropy) and the update with a constant momentum."""
    torch.manual_seed(0)
    rows = unit_rows(7, 16)
    memory = ExemplarMemory(7, 16, dtype=torch.float64)
    memory.load_full(rows)
    for step in range(3):
        features, indices = unit_rows(GLOBAL_BATCH, 16), indices_with_repeats(7)
        features[5] = features[0]  # the same picture twice: equal similarities
        own_features = own_part(features).clone().requires_grad_()
        batch = memory.gather(own_features, own_part(indices))
        loss = batch.loss()
        loss.backward()
        leaf = features.clone().requires_grad_()
        wanted = torch.nn.functional.cross_entropy(leaf @ rows.T / 0.05, indices, reduction="none")
        wanted.mean().backward()
        torch.testing.assert_close(loss, own_part(wanted).mean(), rtol=1e-12, atol=0)
        wanted_gradient = distributed.world_size() * own_part(leaf.grad)
        torch.testing.assert_close(own_features.grad, wanted_gradient, rtol=0, atol=1e-12)
        before = memory.full()
        batch.update(0.1, skip=True, hardest=hardest)
        assert torch.equal(memory.full(), before), step
        batch.update(0.1, hardest=hardest)
        rows = (reference.hardest_update if hardest else reference.update)(rows, features, indices, 0.1)
        torch.testing.assert_close(memory.full(), rows, rtol=0, atol=1e-14)


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_cluster_steps_equal_the_reference(ranks, world_size: int, hardest: bool) -> None:
    run(ranks, world_size, check_cluster_steps, hardest)


def check_hardest_ties() -> None:
    """Of equally similar features the first counts: mirrored at the row, so that the new row tells them apart."""
    memory = ExemplarMemory(4, 2, dtype=torch.float64)
    memory.load_full(torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64))
    signs = torch.tensor([1.0, -1.0] * (GLOBAL_BATCH // 2), dtype=torch.float64)
    features = torch.stack([torch.full_like(signs, 0.6), 0.8 * signs], dim=1)
    features[8] = torch.tensor([1.0, 0.0])  # more similar, and first of its row
    indices = torch.tensor([0, 0, 1, 1, 2, 1, 0, 2, 3, 3, 3, 3])
    batch = memory.gather(own_part(features), own_part(indices))
    batch.update(0.0, hardest=True)
    assert torch.equal(memory.full()[:, 1].sign(), torch.tensor([1.0, 1.0, 1.0, -1.0]).double())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_of_equally_hard_pictures_the_first_counts(ranks, world_size: int) -> None:
    run(ranks, world_size, check_hardest_ties)


def proxies(cameras_of_clusters: list[int]) -> Tensor:
    """(C, 2) the range of each cluster's proxies."""
    stop = torch.tensor(cameras_of_clusters).cumsum(0)
    return torch.stack([stop - torch.tensor(cameras_of_clusters), stop], dim=1)


def check_proxy_loss(cameras_of_clusters: list[int], num_others: int, *, integers: bool, dtype: torch.dtype) -> None:
    """Loss and gradient; with small integers most similarities are equal, at the last of the others too."""
    torch.manual_seed(num_others)
    world_size, ranges = distributed.world_size(), proxies(cameras_of_clusters)
    num_rows = int(ranges[-1, 1])
    clusters = torch.randint(len(ranges), (GLOBAL_BATCH,))
    camids = torch.tensor([0, 3, 0, 1, 0, 0, 3, 3, 5, 0, 1, 0])
    rows, features = unit_rows(num_rows, 16), unit_rows(GLOBAL_BATCH, 16)
    if integers:
        rows, features = (torch.randint(-1, 2, t.shape).double() for t in (rows, features))
    rows, features = rows.to(dtype), features.to(dtype)
    memory = ExemplarMemory(num_rows, 16, temperature=0.07, dtype=dtype, chunk_bytes=32 * 8 * (16 + GLOBAL_BATCH))
    memory.load_full(rows)
    own_features = own_part(features).clone().requires_grad_()
    batch = memory.gather(own_features, own_part(ranges[clusters][:, 0]))
    loss = batch.proxy_loss(own_part(ranges[clusters]), own_part(camids), most_own=6, num_others=num_others)
    (2.0 * loss).backward()
    wanted, gradient = reference.proxy_loss(
        features, ranges[clusters], camids, rows, temperature=0.07, num_others=num_others
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    mean_over_ranks = distributed.all_reduce(loss) / world_size
    torch.testing.assert_close(mean_over_ranks.double(), wanted, rtol=tolerance, atol=tolerance)
    wanted_gradient = 2.0 * world_size * own_part(gradient)
    torch.testing.assert_close(own_features.grad.double(), wanted_gradient, rtol=0, atol=200 * tolerance)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_proxy_loss_equals_the_reference(ranks, world_size: int) -> None:
    """One to six cameras a cluster; fewer others than asked for, none at all, and a rank without rows."""
    for cameras_of_clusters, num_others in (([1, 2, 6, 3, 1] * 12, 50), ([3, 1, 2], 50), ([6], 4), ([1, 1], 1)):
        for dtype in (torch.float64, torch.float32):
            arguments = {"integers": False, "dtype": dtype}
            run_with(ranks, world_size, cameras_of_clusters, num_others, arguments)
    run_with(ranks, world_size, [2, 1, 4] * 15, 7, {"integers": True, "dtype": torch.float64})


def run_with(ranks, world_size: int, cameras_of_clusters: list[int], num_others: int, arguments: dict) -> None:
    if world_size == 1:
        check_proxy_loss(cameras_of_clusters, num_others, **arguments)
    else:
        ranks(world_size).run(check_proxy_loss, cameras_of_clusters, num_others, **arguments)


def proxy_bytes(num_rows: int) -> dict[str, int]:
    memory = ExemplarMemory(num_rows, 16)
    with distributed.count_traffic() as traffic:
        batch = memory.gather(torch.randn(6, 16), torch.arange(6))
        batch.proxy_loss(torch.tensor([[0, 4]] * 6), torch.arange(6), most_own=4, num_others=10)
    return dict(traffic)


def test_traffic_of_proxies_does_not_grow_with_their_number(ranks) -> None:
    assert ranks(2).run(proxy_bytes, 20) == ranks(2).run(proxy_bytes, 2000)


def check_bad_range(own: list[int]) -> None:
    memory = ExemplarMemory(20, 16)
    own_b2 = torch.tensor([[0, 4]] * (GLOBAL_BATCH // distributed.world_size()))
    if distributed.rank() == distributed.world_size() - 1:
        own_b2[-1] = torch.tensor(own)
    batch = memory.gather(torch.randn(len(own_b2), 16), own_b2[:, 0].clamp(0, 19))
    with pytest.raises(UserError, match=rf"the range \[{own[0]}, {own[1]}\] .* 1 to 6 of the 20 rows") as raised:
        batch.proxy_loss(own_b2, torch.zeros(len(own_b2), dtype=torch.int64), most_own=6)
    assert raised.value.on_all_ranks


@pytest.mark.parametrize("world_size", [1, 2])
def test_wrong_ranges_are_refused_on_all_ranks(ranks, world_size: int) -> None:
    for own in ([3, 3], [0, 7], [18, 21], [-1, 2]):
        run(ranks, world_size, check_bad_range, own)
