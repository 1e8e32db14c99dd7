"""Files of weights that hold something else than dense floating point tensors by name: one clear error each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, load_backbone

KEY = "stages.1.conv1.weight"


def state_with(tensor: Any) -> dict[str, Any]:
    return Backbone("small_resnet", 64, 32).body.state_dict() | {KEY: tensor}


def load(content: Any, folder: Path) -> Backbone:
    torch.save(content, folder / "weights.pth")
    backbone = Backbone("small_resnet", 64, 32)
    load_backbone(backbone, str(folder / "weights.pth"))
    return backbone


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([torch.zeros(2)], "list"),
        (None, "NoneType"),
        (torch.zeros(2), "Tensor"),
        ({0: torch.zeros(2)}, "dict"),
        ({"state_dict": {1: torch.zeros(2)}}, "dict"),
    ],
)
def test_what_is_no_state_dict_is_named(content: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"weights.pth holds a {kind}, where a state dict"):
        load(content, tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"not a file of tensors\n", b"\x80\x02.", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_bytes_that_are_no_tensors_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as a file of plain tensors"):
        load_backbone(Backbone("small_resnet", 64, 32), str(tmp_path / name))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(64, 32, 3, 3, dtype=torch.int8), "strided tensor of int8 on cpu"),
        (torch.zeros(64, 32, 3, 3, dtype=torch.complex64), "strided tensor of complex64"),
        (torch.zeros(64, 32, 3, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(64, 32, 3, 3).to_sparse(), "sparse_coo tensor"),
        (torch.zeros(64, 32, 3, 3, device="meta"), "on meta"),
    ],
    ids=["int8", "complex", "float8", "sparse", "meta"],
)
def test_tensors_of_another_kind_are_named(tensor: torch.Tensor, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{KEY} in \S*weights.pth is a .*{kind}.*convert the file"):
        load(state_with(tensor), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_precisions_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(64, 32, 3, 3).to(dtype)
    backbone = load(state_with(values), tmp_path)
    assert torch.equal(backbone.body.get_parameter(KEY), values.float())
