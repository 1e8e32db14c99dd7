"""Benches as fixtures; where they cannot be had, the tests are skipped with the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.benches import TTL_SECONDS, Hosts, bench, missing
from tests.integration.conftest import small_domains  # noqa: F401  (a fixture)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for kind in ("hosts", "slurm", "containers"):
            marked = item.get_closest_marker(f"cluster_{kind}") is not None
            if marked and (reason := missing(kind)):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, a and b, with nothing running on them."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    two = Hosts(bench("netns-up", "-t", TTL_SECONDS, "a", "b"), outputs)
    yield two
    two.down()
