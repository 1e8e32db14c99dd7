"""Shards behind a server; an index whose shards are not there."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ecn_dist.data.index import ShardInfo
from tests.http_server import FolderServer
from tests.unit.data.index_folder import make_index_folder

SHARD_BYTES = 50_000


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    folder = tmp_path / "shards"
    folder.mkdir()
    infos = []
    for number in range(6):
        data = np.random.default_rng(number).bytes(SHARD_BYTES)
        (folder / f"train-{number:06d}.tar").write_bytes(data)
        infos.append(ShardInfo(f"train-{number:06d}.tar", 1, len(data), hashlib.sha256(data).hexdigest()))
    return infos


@pytest.fixture
def server(tmp_path: Path, shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FolderServer(tmp_path / "shards")
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard folder whose shards are not there: the index alone is read."""
    return make_index_folder(tmp_path)
