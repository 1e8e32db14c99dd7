"""What a checkpoint may hold: meta data, files and tensors that no run wrote are refused, each in one text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ecn_dist.distributed import checksum
from ecn_dist.errors import UserError
from ecn_dist.training.checkpoint import MAX_META_BYTES, META, CheckpointStore, damage, load, read_meta

REMOVED = object()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path)
    about = {
        "skipped_steps": 0,
        "timeline": {"steps_per_epoch": 3},
        "sizes": {},
        "data": {"target": "0a"},
        "config": {},
    }
    store.save(12, {"rows": torch.ones(4, 2), "labels": torch.arange(4)}, about | {"device": "cpu"})
    return tmp_path / "step-00000012"


def change(checkpoint: Path, key: str, value: object) -> None:
    meta = json.loads((checkpoint / META).read_text())
    if value is REMOVED:
        del meta[key]
    else:
        meta[key] = value
    (checkpoint / META).write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, REMOVED) for key in ("step", "world_size", "files", "sha256")),
        *(("step", value) for value in (-1, 12.0, "12", True, None, 10**8, 13)),  # 13: not what its name says
        *(("world_size", value) for value in (0, -1, "1", 2.5)),
        *(("files", value) for value in ([], {}, 5, {"../x.safetensors": 1}, {"x\x1b.safetensors": 1}, {"x": 1})),
        ("files", {"shard-0.safetensors": -1}),
        *(("sha256", value) for value in ([], {}, {"x.safetensors": "0a"}, None)),
        *(("skipped_steps", value) for value in ("0", -1, None, 1e9)),
        *(("timeline", value) for value in ([], {"steps_per_epoch": "3"}, {"\x1b": 3}, None)),
        *(("sizes", value) for value in ([], {"clusters": -1}, {"clusters": 2**60}, None)),
        *(("data", value) for value in ([], {"target": 5}, {"target": "\x1b[2J"})),
        *(("device", value) for value in (5, "\x1b", None)),
        *(("config", value) for value in ([], {"\x1b": 1}, None, {"x": [[]]}, {"x": {}}, {"x": "y" * 5000})),
        *(("evaluation", value) for value in (5, [], {}, {"mAP_stepwise": None}, {"mAP_stepwise": float("nan")})),
        *(("validation", value) for value in (5, {}, {"mAP_stepwise": 0.5}, {"mAP_stepwise": "x", "data": "0a"})),
        ("ended_epoch", []),
    ],
)
def test_meta_data_that_no_run_writes_are_damage(checkpoint: Path, key: str, value: object) -> None:
    change(checkpoint, key, value)
    with pytest.raises(UserError, match=r"step-00000012 is no complete checkpoint: its meta.json is damaged") as caught:
        read_meta(checkpoint)
    assert key in str(caught.value)
    assert str(caught.value).isprintable()
    assert damage(checkpoint) == str(caught.value)
    assert CheckpointStore(checkpoint.parent).newest() is None


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{}", b"[]", b"5", b"null", b"\xff\xfe", b'{"step": 1' + b"0" * 5000 + b"}", b"{"]
)
def test_text_that_no_parser_should_choke_on_is_damage(checkpoint: Path, text: bytes) -> None:
    (checkpoint / META).write_bytes(text)
    assert "damaged" in str(damage(checkpoint))


def test_meta_data_without_end_are_damage(checkpoint: Path) -> None:
    text = (checkpoint / META).read_text()
    (checkpoint / META).write_text(text[:-1] + " " * MAX_META_BYTES + "}")
    assert "damaged" in str(damage(checkpoint))


def signed(checkpoint: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Another file in place of the one that was written, to which meta.json is made to fit."""
    path = next(checkpoint.glob("*.safetensors"))
    save_file(tensors, path, about)
    change(checkpoint, "files", {path.name: path.stat().st_size})
    change(checkpoint, "sha256", {path.name: checksum(path)})


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("rows", torch.ones(4, 2, dtype=torch.int8)),
        ("rows", torch.ones(4, 2, dtype=torch.complex64)),
        ("rows", torch.ones(4, 2).to(torch.float8_e4m3fn)),
        ("labels", torch.arange(4).double()),
        ("labels", torch.arange(4).int()),
    ],
)
def test_tensors_of_another_kind_are_named(checkpoint: Path, key: str, tensor: Tensor) -> None:
    state = {"rows": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    signed(checkpoint, state | {key: tensor})
    with pytest.raises(UserError, match=rf"step-00000012 does not fit: {key} is of {tensor.dtype} and not"):
        load(checkpoint, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision_is_taken(checkpoint: Path, dtype: torch.dtype) -> None:
    state = {"rows": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    signed(checkpoint, state | {"rows": torch.full((4, 2), 0.5, dtype=dtype)})
    load(checkpoint, state)
    assert (state["rows"] == 0.5).all()


@pytest.mark.parametrize(
    "about",
    ["{", "[]", '"x"', "{}", '{"rows": 5}', '{"rows": {"saved_offsets": "x"}}', '{"rows": {"saved_offsets": [9, 9]}}'],
)
def test_headers_that_torch_would_take_as_they_are(checkpoint: Path, about: str) -> None:
    state: dict[str, Any] = {"rows": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    signed(checkpoint, state, {"DCP_SHARDING_INFO": about})
    with pytest.raises(UserError, match=r"step-00000012 (has a damaged file|does not fit)"):
        load(checkpoint, state)


def test_a_tensor_of_more_dimensions_than_its_header_tells(checkpoint: Path) -> None:
    state: dict[str, Any] = {"rows": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    told = json.dumps({"rows": {"saved_offsets": [0, 0]}, "labels": {"saved_offsets": [0]}})
    signed(checkpoint, state | {"labels": torch.zeros(4, 1, dtype=torch.int64)}, {"DCP_SHARDING_INFO": told})
    with pytest.raises(UserError, match=r"step-00000012 does not fit: labels is \(4, 1\) and not \(4,\)"):
        load(checkpoint, state)
