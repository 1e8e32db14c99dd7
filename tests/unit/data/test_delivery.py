"""Batches on their way to a device: nothing waits for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from ecn_dist.data.index import SplitIndex
from ecn_dist.data.stream import EvaluationStream
from tests.tiny_shards import write_split
from tests.unit.data.test_stream import batches, train_stream

META = torch.device("meta")  # has no data, so that whatever asks for it fails
WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class NoWaiting(TorchFunctionMode):
    """Fails on what waits for a device: reading a tensor of it, and copies that do not say `non_blocking`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.copies = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        name = (resolve_name(function) or "").rsplit(".", 1)[-1]
        if any(tensor.device == self.device for tensor in tensors):
            assert name not in WAITS, f"{name} waits"
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device == self.device:
            from_host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim]
            if name == "tensor" or from_host:
                assert kwargs.get("non_blocking"), f"{name} copies to the device and waits"
                self.copies += 1
        return result


@pytest.fixture
def split(tmp_path: Path) -> SplitIndex:
    return write_split(tmp_path, [20, 10, 20])


def test_the_check_sees_what_waits() -> None:
    there, here = torch.zeros(3, device=META), torch.zeros(3)
    with NoWaiting(META):
        for waits in (
            lambda: there.tolist(),
            lambda: there[0].item(),
            lambda: there.cpu(),
            lambda: bool(there[0]),
            lambda: here.to(META),
            lambda: there.copy_(here),
            lambda: torch.tensor([1.0], device=META),
        ):
            with pytest.raises(AssertionError, match="waits"):
                waits()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("style", ["random", "all"])
def test_no_delivery_waits_for_the_device(split: SplitIndex, workers: int, style: str) -> None:
    batches(split, last_step=1, device=META)  # the constants
    stream = train_stream(split, device=META, style=style, workers=workers)
    with NoWaiting(META) as mode:
        delivered = list(stream.batches(0, 9))
    assert mode.copies == len(delivered) == 9  # one each
    expected = batches(split, style=style)
    for there, here in zip(delivered, expected, strict=True):
        assert there.images.shape == here.images.shape
        assert there.labels.shape == there.indices.shape == here.labels.shape
    evaluation = EvaluationStream(split, height=32, width=16, batch_size=8, device=META, workers=workers)
    with NoWaiting(META) as mode:
        assert len(list(evaluation)) == mode.copies == 7


def test_the_next_batch_is_on_its_way_while_one_is_used(split: SplitIndex) -> None:
    batches(split, last_step=1, device=META)  # the constants
    with NoWaiting(META) as mode:
        made = train_stream(split, device=META).batches(0, 4)
        copies = []
        for _ in made:
            copies.append(mode.copies)
    assert copies == [2, 3, 4, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_an_accelerator_is_given_the_same_batches(split: SplitIndex, workers: int) -> None:
    device = torch.device("cuda")
    for there, here in zip(batches(split, device=device, workers=workers), batches(split), strict=True):
        assert torch.equal(there.images.cpu(), here.images)
        assert torch.equal(there.indices.cpu(), here.indices)
