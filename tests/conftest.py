"""Fixtures shared by all tests."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.ranks import RankPool, start_fork_server


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(3).run(function, *args)` runs a top-level function on 3 gloo ranks; assert inside it, on every rank."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(autouse=True, scope="session")
def _fork_server() -> None:
    start_fork_server()  # before a loader starts one that knows less


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs an accelerator or DeepSpeed where it is not there."""
    missing = {}
    if not torch.accelerator.is_available():
        missing["gpu"] = "needs an accelerator, and this machine has none"
    if find_spec("deepspeed") is None:
        missing["deepspeed"] = "DeepSpeed is not installed: pip install --no-deps -r requirements-extras.txt"
    for item in items:
        for marker in missing.keys() & item.keywords:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=missing[marker]))
