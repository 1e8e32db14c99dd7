"""The collectives on 1, 2 and 3 ranks."""

import socket

import pytest
import torch

from ecn_dist import distributed
from ecn_dist.errors import UserError


def check_collectives() -> None:
    rank, world_size = distributed.rank(), distributed.world_size()
    own = torch.tensor([[rank, 0.0], [rank, 1.0]])
    everything = torch.tensor([[r, i] for r in range(world_size) for i in (0.0, 1.0)])
    assert torch.equal(distributed.all_gather_rows(own), everything)
    assert torch.equal(distributed.reduce_scatter_rows(everything), world_size * own)
    pending = distributed.start_all_gather_rows(own)
    assert torch.equal(pending.wait(), everything)
    assert torch.equal(pending.wait(), everything)
    assert torch.equal(
        distributed.exchange_rows(everything + 10 * rank), torch.stack([own + 10 * r for r in range(world_size)])
    )
    uneven = distributed.all_gather_uneven_rows(torch.full((rank, 2), rank))
    assert uneven.tolist() == [[r, r] for r in range(world_size) for _ in range(r)]
    nothing = distributed.all_gather_uneven_rows(torch.zeros(0, 2, dtype=torch.int64))
    assert nothing.shape == (0, 2)
    assert nothing.dtype == torch.int64
    assert distributed.all_reduce(torch.tensor(float(rank)), "max") == world_size - 1
    assert distributed.all_reduce(torch.ones(2))[0] == world_size
    assert distributed.any_rank(rank == world_size - 1)
    assert not distributed.any_rank(False)
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert distributed.gather_objects(rank) == list(range(world_size))


def check_together() -> None:
    assert distributed.together(lambda: 7) == 7
    last = distributed.world_size() - 1

    def fail_on_the_last(error: Exception) -> None:
        if distributed.rank() == last:
            raise error

    for error, words in (
        (PermissionError(13, "Permission denied", "/runs/x"), "/runs/x"),
        # An error of write() has no file's name.
        (OSError(28, "No space left on device"), r"report\.html: .*No space left on device\. Free space"),
        (UserError(""), "UserError"),
        (OSError(), "OSError"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            distributed.together(lambda error=error: fail_on_the_last(error), "report.html")
        assert raised.value.on_all_ranks


def check_raise_together() -> None:
    distributed.raise_together(None)
    last = distributed.world_size() - 1
    for text, words in (("shard-7 is gone", "shard-7 is gone"), ("", "an error without a text")):
        with pytest.raises(UserError, match=words) as raised:
            distributed.raise_together(text if distributed.rank() == last else None)
        assert last == 0 or str(raised.value).startswith(f"rank {last} on host {socket.gethostname()}: ")
    with pytest.raises(UserError, match=r"^the same$"):
        distributed.raise_together("the same")


def count_gathered_bytes() -> int:
    with distributed.count_traffic() as traffic:
        distributed.all_gather_rows(torch.zeros(5, 3))
    return traffic["all_gather"]


def test_one_process_needs_no_group() -> None:
    check_collectives()
    check_raise_together()
    check_together()
    assert count_gathered_bytes() == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks(ranks, world_size: int) -> None:
    ranks(world_size).run(check_collectives)
    ranks(world_size).run(check_raise_together)
    ranks(world_size).run(check_together)
    assert ranks(world_size).run(count_gathered_bytes) == [60] * world_size
