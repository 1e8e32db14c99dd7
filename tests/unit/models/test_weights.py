"""Files of weights that hold something else than dense floating point tensors by name: one clear error each."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import errno
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, export_weights, load_backbone
from tests.networks import source_network

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


def test_an_export_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_weights(source_network(), tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == 0o640


def test_an_export_that_finds_no_room_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"of before")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UserError, match=r"weights\.safetensors: cannot be written \(File too large\)"):
            export_weights(source_network(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [item.name for item in tmp_path.iterdir()] == ["weights.safetensors"]
    assert path.read_bytes() == b"of before"


def test_weights_that_may_not_be_read_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights do not bind the tests where root runs them, so the system's answer is given here."""
    path = tmp_path / "weights.safetensors"
    export_weights(source_network(), path)

    def refuse(path: Path, mode: str = "r") -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read \(Permission denied\); correct"):
        load_backbone(Backbone("small_resnet", 64, 32), str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"neck.running_mean": None}, "missing: neck.running_mean"),
        ({"neck.weight": torch.ones(3)}, r"of another shape: neck.weight \(3,\)"),
        ({"neck.weight": torch.ones(128, dtype=torch.int8)}, "neck.weight in .* is a strided tensor of int8"),
    ],
)
def test_a_neck_that_does_not_fit_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    backbone = Backbone("small_resnet", 64, 32, neck=True)
    state = backbone.body.state_dict() | {f"neck.{key}": value for key, value in backbone.neck.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    load_backbone(backbone, str(tmp_path / "weights.pth"))
    torch.save({key: value for key, value in (state | change).items() if value is not None}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=said):
        load_backbone(backbone, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    "tensors",
    [
        dict.fromkeys(
            (
                "part_token1",
                "part_token2",
                "part_token3",
                "cls_pos",
                "part1_pos",
                "part2_pos",
                "part3_pos",
                "pos_embed",
            ),
            torch.zeros(3),
        ),
        {"stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(2), "stages.x": torch.zeros(2)},
        {"stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(2), "stages.0.downsample.norm.weight": torch.zeros(3)},
        {
            "stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(2),
            "stages.1.downsample.reduction.weight": torch.zeros(4, 8),
            "semantic_embed_w.0.weight": torch.zeros(4),
            "semantic_embed_b.0.weight": torch.zeros(4, 2),
        },
    ],
)
def test_known_names_of_unknown_shapes(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights.pth (has known names for tensors of unknown shapes|does not fit)"):
        load(tensors, tmp_path)


@pytest.mark.parametrize("text", ["", "5", '"abc"', '[1, 2, "3"]', "[0.5, 0.5]", "[0.5, 0.5, NaN]", "[" * 9999, "{}"])
def test_a_mean_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    backbone = Backbone("small_resnet", 64, 32)
    about = '{"mean": ' + text + ', "std": [0.5, 0.5, 0.5]}'
    save_file(backbone.body.state_dict(), path, {"network": about})
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read as a file"):
        load_backbone(backbone, str(path))


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = Backbone("resnet18", 64, 32)
    with pytest.raises(UserError, match="nothing is downloaded") as refused:
        load_backbone(backbone, "https://user:secret@host/x.pth?token=secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(
        UserError, match=rf"curl --create-dirs -o '{tmp_path}/hub/checkpoints/resnet18-\w+.pth' https://"
    ):
        load_backbone(backbone, "imagenet")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_precisions_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(64, 32, 3, 3).to(dtype)
    backbone = load(state_with(values), tmp_path)
    assert torch.equal(backbone.body.get_parameter(KEY), values.float())
