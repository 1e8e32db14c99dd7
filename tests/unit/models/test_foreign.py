"""Files with the names and shapes of public checkpoints pretrained on persons, made here: the files are not at hand."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ecn_dist.errors import UserError
from ecn_dist.methods.source_only import SourceOnly
from ecn_dist.models import Backbone, backbones, export_weights, load_backbone, load_weights
from tests.networks import setting

HEIGHT, WIDTH = 64, 32
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def needs_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps -r requirements-extras.txt")
    importlib.import_module("tests.small_timm")


def images() -> Tensor:
    return torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


def method(arch: str, **own: list[float]) -> nn.Module:
    """What `load_weights` takes: something with a backbone."""
    network = nn.Module()
    network.backbone = Backbone(arch, HEIGHT, WIDTH, **own)
    return network


def of_dino(body: dict[str, Tensor]) -> dict:
    """A checkpoint of DINO: teacher and student, each backbone and head under `module.`, and the command line."""
    head = {"module.head.mlp.0.weight": torch.zeros(8, 8), "module.head.last_layer.weight_g": torch.zeros(8, 1)}
    teacher = {f"module.backbone.{key}": value for key, value in body.items()} | head
    student = {key: value + 1 for key, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit", lr=1e-3)}


def written(content: dict, folder: Path) -> str:
    torch.save(content, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")


def test_moco_of_luperson(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Backbone("resnet50", HEIGHT, WIDTH).eval()
    state = {f"module.encoder_q.{key}": value for key, value in theirs.body.state_dict().items()}
    state |= {f"module.encoder_k.{key}": value + 1 for key, value in theirs.body.state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(2048, 2048), "module.encoder_q.fc.0.bias": torch.zeros(2048)}
    state |= {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    file = written({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}, tmp_path)
    with pytest.raises(UserError, match=r"mean \[0.3525, 0.3106, 0.314\] .*LUPerson.*--model.std '\[0.266, 0.2522"):
        load_weights(method("resnet50"), file)
    ours = method("resnet50", mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    assert load_weights(ours, file) == []
    torch.testing.assert_close(ours.backbone.eval()(images()), theirs(images()))
    with pytest.raises(UserError, match="such as resnet50"):
        load_weights(method("resnet18"), file)


def test_vit_of_transreid_ssl(tmp_path: Path) -> None:
    needs_timm()
    theirs = Backbone("timm/ecn_vit+ics", HEIGHT, WIDTH).eval()
    names = set(theirs.body.state_dict())
    stem = {f"conv.{at}.weight": (64, 3 if at == 0 else 64, size, size) for at, size in ((0, 7), (3, 3), (6, 3))}
    for name, shape in stem.items():
        assert theirs.body.state_dict()[f"patch_embed.{name}"].shape == shape
    assert {"patch_embed.conv.1.IN.weight", "patch_embed.conv.4.BN.running_mean", "patch_embed.conv.7.bias"} <= names
    assert theirs.body.patch_embed.proj.weight.shape == (24, 64, 8, 8)
    file = written(of_dino(theirs.body.state_dict()), tmp_path)
    with pytest.raises(UserError, match=r"mean \[0.5, 0.5, 0.5\] .*TransReID-SSL"):
        load_weights(method("timm/ecn_vit+ics"), file)
    with pytest.raises(UserError, match=r"unexpected: patch_embed.conv.*TransReID-SSL: such as timm/vit_small_.*\+ics"):
        load_weights(method("timm/ecn_vit", **HALF), file)
    ours = method("timm/ecn_vit+ics", **HALF)
    assert load_weights(ours, file) == []
    torch.testing.assert_close(ours.backbone.eval().body(images()), theirs(images()))


def test_ics_stem_is_the_published_one() -> None:
    needs_timm()
    stem = Backbone("timm/ecn_vit+ics", HEIGHT, WIDTH).body.patch_embed.eval()
    state = stem.state_dict()
    x = images()
    for at in (0, 3, 6):
        x = F.conv2d(x, state[f"conv.{at}.weight"], stride=2 if at == 0 else 1, padding=3 if at == 0 else 1)
        if at < 6:  # InstanceNorm and BatchNorm (untrained: x / sqrt(1 + eps)), half and half
            x = torch.cat([F.instance_norm(x[:, :32]), x[:, 32:] / (1 + 1e-5) ** 0.5], 1).relu()
        else:
            x = (x / (1 + 1e-5) ** 0.5).relu()
    wanted = F.conv2d(x, state["proj.weight"], state["proj.bias"], stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images()), wanted, rtol=1e-4, atol=1e-5)


def test_vit_of_pass_with_its_part_tokens(tmp_path: Path) -> None:
    needs_timm()
    body = Backbone("timm/ecn_vit+ics", HEIGHT, WIDTH).body.eval()
    state = {key: value for key, value in body.state_dict().items() if key != "pos_embed"}
    tokens = {f"part_token{part}": torch.randn(1, 1, 24) for part in (1, 2, 3)}
    positions = {f"{name}_pos": torch.randn(1, 1, 24) for name in ("cls", "part1", "part2", "part3")}
    patches = torch.randn(1, 8, 24)
    file = written(of_dino(state | tokens | positions | {"pos_embed": patches}), tmp_path)
    ours = method("timm/ecn_vit+ics+parts", **HALF)
    assert load_weights(ours, file) == []

    tokens_all = torch.cat([state["cls_token"], *tokens.values()], 1).expand(2, -1, -1)
    x = torch.cat([tokens_all, body.patch_embed(images())], 1) + torch.cat([*positions.values(), patches], 1)
    wanted = body.norm(body.blocks(x))[:, 0]
    torch.testing.assert_close(ours.backbone.eval().body(images()), wanted)

    larger = Backbone("timm/ecn_vit+ics+parts", 2 * HEIGHT, 2 * WIDTH)
    load_backbone(larger, file)
    assert larger.body.pos_embed.shape == (1, 4 + 32, 24)
    del positions["part2_pos"]
    with pytest.raises(UserError, match=r"missing: reg_token, pos_embed.*PASS"):
        load_weights(method("timm/ecn_vit+ics+parts", **HALF), written(of_dino(state | tokens | positions), tmp_path))


def swin_of_solider(body: nn.Module, semantic: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a timm Swin, with the names and orders of mmdetection's."""
    state: dict[str, Tensor] = dict(semantic)
    for key, tensor in body.state_dict().items():
        key = key.replace("patch_embed.proj", "patch_embed.projection").replace("layers.", "stages.")
        key = (
            key.replace(".attn.", ".attn.w_msa.")
            .replace("mlp.fc1", "ffn.layers.0.0")
            .replace("mlp.fc2", "ffn.layers.1")
        )
        if "downsample" in key:
            _, stage, rest = key.split(".", 2)
            key = f"stages.{int(stage) - 1}.{rest}"
            channels = tensor.shape[-1] // 4
            # nn.Unfold's order: channel, row, column; timm's: column, row, channel
            order = [(column * 2 + row) * channels + c for c in range(channels) for row in (0, 1) for column in (0, 1)]
            tensor = tensor[..., order]
        state["norm2" + key.removeprefix("norm") if key.startswith("norm.") else key] = tensor
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.int64)
    return state | {"norm0.weight": torch.ones(8), "norm1.weight": torch.ones(16)}


def test_swin_of_solider_with_its_semantic_embedding(tmp_path: Path) -> None:
    needs_timm()
    torch.manual_seed(0)
    theirs = Backbone("timm/ecn_swin", HEIGHT, WIDTH).eval()
    semantic = {}
    for stage, channels in ((0, 16), (1, 32), (2, 32)):
        for kind in "wb":
            semantic[f"semantic_embed_{kind}.{stage}.weight"] = torch.randn(channels, 2)
            semantic[f"semantic_embed_{kind}.{stage}.bias"] = torch.randn(channels)
    state = swin_of_solider(theirs.body, semantic)
    unfolded = F.unfold(images()[:, :, :8, :8].repeat(1, 3, 1, 1)[:, :8], 2, stride=2).transpose(1, 2)
    merging = theirs.body.layers[1].downsample
    normed = F.layer_norm(unfolded, (32,), *(state[f"stages.0.downsample.norm.{kind}"] for kind in ("weight", "bias")))
    by_unfold = normed @ state["stages.0.downsample.reduction.weight"].T
    by_timm = merging(images()[:, :, :8, :8].repeat(1, 3, 1, 1)[:, :8].permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(
        by_unfold, by_timm, rtol=1e-4, atol=1e-5
    )  # the order above is that of the published code

    ours = method("timm/ecn_swin+semantic", **HALF)
    file = written({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path)
    assert load_weights(ours, file) == []
    x = theirs.body.patch_embed(images())
    weights_2 = torch.tensor([0.2, 0.8])
    for at, layer in enumerate(theirs.body.layers):
        x = layer.downsample(x)
        if at:
            scale, shift = (
                semantic[f"semantic_embed_{kind}.{at - 1}.weight"] @ weights_2
                + semantic[f"semantic_embed_{kind}.{at - 1}.bias"]
                for kind in "wb"
            )
            x = x * F.softplus(scale) + shift
        x = layer.blocks(x)
    wanted = theirs.body.norm(x).mean((1, 2))
    torch.testing.assert_close(ours.backbone.eval().body(images()), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UserError, match=r"unexpected: layers.1.downsample.reduction.bias.*SOLIDER: such as .*\+semantic"
    ):
        load_weights(method("timm/ecn_swin", **HALF), file)


def test_an_export_carries_its_normalisation(tmp_path: Path) -> None:
    assert (backbones.IMAGENET_MEAN, backbones.IMAGENET_STD) == (IMAGENET_MEAN, IMAGENET_STD)
    network = SourceOnly(setting())
    export_weights(network, tmp_path / "imagenet.safetensors")
    assert load_weights(SourceOnly(setting()), str(tmp_path / "imagenet.safetensors")) == []
    network.backbone = Backbone("small_resnet", HEIGHT, WIDTH, **HALF)
    export_weights(network, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"mean \[0.5, 0.5, 0.5\] and deviation \[0.5, 0.5, 0.5\]"):
        load_weights(SourceOnly(setting()), str(tmp_path / "half.safetensors"))
    assert load_weights(network, str(tmp_path / "half.safetensors")) == []


def test_objects_in_a_checkpoint_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a file of plain tensors"):
        load_weights(method("small_resnet"), written({"teacher": {}, "args": Path("x")}, tmp_path))
