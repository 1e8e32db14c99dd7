"""Fixtures shared by all tests."""

from collections.abc import Iterator

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
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
