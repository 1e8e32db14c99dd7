"""Benches as fixtures; where they cannot be had, the tests are skipped with the reason."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.benches import TTL_SECONDS, Hosts, bench, missing
from tests.cluster.images import Store
from tests.integration.conftest import Domains, make_domains


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for kind in ("hosts", "slurm", "containers"):
            marked = item.get_closest_marker(f"cluster_{kind}") is not None
            if marked:
                item.add_marker(pytest.mark.timeout(900))  # each waits several times, patiently
            if marked and (reason := missing(kind)):
                item.add_marker(pytest.mark.skip(reason=reason))
    # The image is built while the others run. A stable sort: nothing else changes its place.
    items.sort(key=lambda item: item.get_closest_marker("cluster_containers") is not None)


@pytest.fixture(scope="session")
def small_domains(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    """Steps that are long enough to be cut off between two of them."""
    return make_domains(tmp_path_factory.mktemp("domains"), identities=50)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, a and b, with nothing running on them."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    two = Hosts(bench("netns-up", "-t", TTL_SECONDS, "a", "b"), outputs)
    yield two
    two.down()


def _built() -> Store:
    store = Store()
    try:
        store.build()
    except BaseException:
        store.down()
        raise
    return store


@pytest.fixture(scope="session", autouse=True)
def _image_ahead(request: pytest.FixtureRequest) -> Iterator[Future[Store] | None]:
    """Builds the image while other tests wait for their hosts' time-outs: it takes minutes, and is needed last."""
    wanted = [item for item in request.session.items if item.get_closest_marker("cluster_containers")]
    if not wanted or missing("containers"):
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(_built)
        yield building
    if building.exception() is None:
        building.result().down()


@pytest.fixture(scope="session")
def image(_image_ahead: Future[Store]) -> Store:
    """The store in which the image is."""
    return _image_ahead.result()
