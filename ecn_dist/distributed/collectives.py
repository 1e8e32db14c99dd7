"""The collectives the project needs, each the identity on one rank.

Shape letters: b rows here, B rows on all ranks (B = W b), W ranks.
"""

import errno
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ecn_dist.distributed.liveness import entering
from ecn_dist.distributed.process_group import is_main, world_size
from ecn_dist.errors import UserError

T = TypeVar("T")

# The names of torch 2.13, or those before it.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# Bytes this rank hands to tensor collectives, by operation, while `count_traffic` is active.
_traffic: Counter[str] | None = None


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank hands to tensor collectives, by operation, inside the block."""
    global _traffic
    previous, _traffic = _traffic, Counter()
    try:
        yield _traffic
    finally:
        _traffic = previous


def _enter(operation: str, payload: Tensor) -> None:
    entering(operation)
    if _traffic is not None and world_size() > 1:
        _traffic[operation] += payload.numel() * payload.element_size()


def all_gather_rows(rows: Tensor) -> Tensor:
    """(b, ...) on every rank, equal b -> (B, ...) on every rank, in rank order. Not differentiable."""
    return start_all_gather_rows(rows).wait()


class PendingRows:
    """Rows on their way from all ranks, as `start_all_gather_rows` returns them."""

    def __init__(self, rows: Tensor, work: dist.Work | None) -> None:
        self._rows, self._work = rows, work

    def wait(self) -> Tensor:
        """(B, ...) in rank order. On an accelerator its stream waits, not the host. May be called again."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows


def start_all_gather_rows(rows: Tensor) -> PendingRows:
    """`all_gather_rows`, begun and not waited for: other work can go on until `wait()`."""
    if world_size() == 1:
        return PendingRows(rows.detach(), None)
    rows = rows.detach().contiguous()
    _enter("all_gather", rows)
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    return PendingRows(gathered, _all_gather(gathered, rows, async_op=True))


def all_gather_uneven_rows(rows: Tensor) -> Tensor:
    """(n_r, ...) on rank r, any n_r -> all rows on every rank, in rank order. Two all-gathers. Not differentiable."""
    if world_size() == 1:
        return rows.detach()
    counts = all_gather_rows(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    if not max(counts):
        return rows.detach()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    parts = all_gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatter_rows(rows: Tensor) -> Tensor:
    """(B, ...) on every rank -> this rank's (b, ...) of the sum over ranks. B must divide by the ranks."""
    if world_size() == 1:
        return rows
    rows = rows.contiguous()
    _enter("reduce_scatter", rows)
    own = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    _reduce_scatter(own, rows)
    return own


def exchange_rows(rows: Tensor) -> Tensor:
    """(B, ...) on every rank -> (W, b, ...): what each rank holds for this rank's rows. Sends each row to one rank."""
    if world_size() == 1:
        return rows.detach().unsqueeze(0)
    rows = rows.detach().contiguous()
    _enter("all_to_all", rows)
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows)
    return received.unflatten(0, (world_size(), -1))


def all_reduce(tensor: Tensor, reduction: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """The element-wise sum, maximum or minimum over ranks, as a new tensor. Not differentiable."""
    if world_size() == 1:
        return tensor.detach()
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    _enter("all_reduce", result)
    dist.all_reduce(result, op=_REDUCTIONS[reduction])
    return result


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on every rank. One small all-reduce on the CPU."""
    return bool(all_reduce(torch.tensor(int(flag)), "max").item())


def any_rank_of(*flags: bool) -> tuple[bool, ...]:
    """`any_rank` of each of several flags, at the cost of one."""
    return tuple(bool(flag) for flag in all_reduce(torch.tensor([int(flag) for flag in flags]), "max").tolist())


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank(False)


def broadcast_object(value: T) -> T:
    """Rank 0's `value` (any picklable object of this program) on every rank."""
    if world_size() == 1:
        return value
    entering("broadcast_object")
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    entering("gather_objects")
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def raise_together(error: str | None, *, of_main: bool = False) -> None:
    """Where any rank gives an error, raise a `UserError` on all ranks alike, so that none waits. Collective.

    The ranks are named with their hosts, but where all give the same, or only rank 0 can (`of_main`).
    """
    given = enumerate(
        gather_objects(None if error is None else (socket.gethostname(), error or "an error without a text"))
    )
    errors = {at: found for at, found in given if found is not None}
    texts = {text for _, text in errors.values()}
    if len(texts) == 1 and (of_main or len(errors) == world_size()):
        raise UserError(texts.pop(), on_all_ranks=True)
    if errors:
        named = (f"rank {at} on host {host}: {text}" for at, (host, text) in errors.items())
        raise UserError("\n".join(named), on_all_ranks=True)


def together(action: Callable[[], T], what: str = "", *, of_main: bool = False) -> T:
    """This rank's result of `action`; a `UserError` or an `OSError` of any rank is raised on all ranks. Collective.

    `what` names the file, or what is done: the error of a `write` that finds the disk full does not.
    """
    result, error = None, None
    try:
        result = action()
    except (UserError, OSError) as failure:
        error = str(failure) or type(failure).__name__
        if isinstance(failure, OSError) and what:
            error = f"{what}: {error}"
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            error += ". Free space on that disk, and start again"
    raise_together(error, of_main=of_main)
    return cast(T, result)


def on_main(action: Callable[[], T], what: str = "") -> T:
    """Rank 0's result of `action`, on every rank; an error is raised on all of them, as by `together`."""
    return broadcast_object(cast(T, together(lambda: action() if is_main() else None, what, of_main=True)))
