"""Fixtures shared by all tests."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(3).run(function, *args)` runs a top-level function on 3 gloo ranks; assert inside it, on every rank."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs an accelerator or the extra `deepspeed` where it is not there."""
    no_gpu = pytest.mark.skip(reason="needs an accelerator, and this machine has none")
    no_deepspeed = pytest.mark.skip(reason="deepspeed is not installed (pip install 'ecn_dist[deepspeed]')")
    has_gpu, has_deepspeed = torch.accelerator.is_available(), find_spec("deepspeed") is not None
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        if ("deepspeed" in item.name or "zero-" in item.name) and not has_deepspeed:
            item.add_marker(no_deepspeed)
