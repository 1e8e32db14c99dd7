"""An index.json with its sidecar, and no shards: what an index alone is read from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ecn_dist.data.index import member_dtype

NUM_CAMERAS = 3


def make_members(pids: list[int]) -> np.ndarray:
    """Rows in another order than the indices, all style copies there."""
    members = np.zeros(len(pids), member_dtype(NUM_CAMERAS))
    members["index"] = np.arange(len(pids))[::-1]
    members["pid"] = pids
    members["camid"] = np.arange(len(pids)) % NUM_CAMERAS
    members["length"] = 7
    members["length"][np.arange(len(pids)), members["camid"]] = 0
    return members


def make_index_folder(tmp_path: Path) -> Path:
    """A shard folder whose shards are not there: the index alone is read."""
    members = make_members([5, 3, 5, 9])
    members["shard"] = [0, 0, 0, 1]
    np.save(tmp_path / "train.members.npy", members)
    sidecar = (tmp_path / "train.members.npy").read_bytes()
    train = {
        "identities": [9, 5, 3],
        "members": {
            "name": "train.members.npy",
            "bytes": len(sidecar),
            "sha256": hashlib.sha256(sidecar).hexdigest(),
        },
        "shards": [
            {"name": "train-000000.tar", "samples": 3, "bytes": 100, "sha256": "0a" * 32},
            {"name": "train-000001.tar", "samples": 1, "bytes": 50, "sha256": "0b" * 32},
        ],
    }
    write_index(
        tmp_path,
        {
            "format": "ecn_dist shards",
            "version": 1,
            "layout": "market",
            "num_cameras": NUM_CAMERAS,
            "cameras": ["1", "2", "4"],
            "splits": {"train": train},
        },
    )
    return tmp_path


def write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "index.json").write_text(json.dumps(index))


def read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())
