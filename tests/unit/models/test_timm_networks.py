"""Networks of timm: features, stages, options, and weights made for another input."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, convert_batchnorm, load_backbone, load_weights
from tests.networks import setting

pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps -r requirements-extras.txt")
small_timm = importlib.import_module("tests.small_timm")

HEIGHT, WIDTH = 64, 32
SMALL = [f"timm/{name}" for name in small_timm.NAMES]


def images(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("arch", SMALL)
def test_features_are_pooled_as_timm_does(arch: str) -> None:
    backbone = Backbone(arch, HEIGHT, WIDTH).eval()
    body = backbone.body
    features = backbone(images())
    assert features.shape == (2, backbone.num_features)
    torch.testing.assert_close(features, body.forward_head(body.forward_features(images()), pre_logits=True))
    if arch == "timm/ecn_vit":
        assert body.pos_embed.shape == (1, 1 + 4 * 2, 24)
        torch.testing.assert_close(features, body.norm(body.forward_features(images()))[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "frozen"),
    [
        ("timm/ecn_vit", ("patch_embed.", "cls_token", "pos_embed", "blocks.0.")),
        ("timm/ecn_vit+ics+parts", ("patch_embed.", "cls_token", "reg_token", "pos_embed", "blocks.0.")),
        ("timm/ecn_swin", ("patch_embed.", "layers.0.")),
        ("timm/ecn_convnext", ("stem.", "stages.0.")),
        ("timm/ecn_resnet", ("conv1.", "bn1.", "layer1.")),
    ],
)
def test_frozen_stages_and_layers_learning_rates(arch: str, frozen: tuple[str, ...]) -> None:
    backbone = Backbone(arch, HEIGHT, WIDTH)
    rate_of = {id(p): group["lr"] for group in backbone.parameter_groups(0.8, 0.5) for p in group["params"]}
    last = len(backbone.stages) - 1
    for name, parameter in backbone.body.named_parameters():
        stage = 0 if name.startswith(frozen[:-1]) else 1 if name.startswith(frozen[-1]) else None
        if stage is not None:
            assert math.isclose(rate_of[id(parameter)], 0.8 * 0.5 ** (last - stage)), name
    assert max(rate_of.values()) == 0.8
    backbone.freeze(2, shortcut_batchnorm_trains=False)
    backbone.train()
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    backbone(images()).sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in backbone.parameters())


def test_last_stride_and_gem_of_a_resnet() -> None:
    torch.manual_seed(0)
    plain = Backbone("timm/ecn_resnet", HEIGHT, WIDTH).eval()
    torch.manual_seed(0)
    dense = Backbone("timm/ecn_resnet", HEIGHT, WIDTH, last_stride=1, pooling="gem").eval()
    assert plain.body.forward_features(images()).shape[2:] == (2, 1)
    last_map = dense.body.forward_features(images())
    assert last_map.shape[2:] == (4, 2)
    wanted = last_map.double().clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(dense(images()).double(), wanted, rtol=1e-4, atol=1e-6)
    for key, tensor in plain.body.state_dict().items():
        assert torch.equal(tensor, dense.body.state_dict()[key]), key
    assert Backbone("timm/resnet18d", HEIGHT, WIDTH, last_stride=1).eval().body.forward_features(images()).shape[2] == 4


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("timm/ecn_vit", {"last_stride": 1}, "model.last_stride: timm/ecn_vit is no ResNet"),
        ("timm/resnest14d", {"last_stride": 1}, "model.last_stride: timm/resnest14d is no ResNet whose"),
        ("timm/ecn_convnext", {"pooling": "gem"}, "model.pooling: timm/ecn_convnext has no average"),
        ("timm/ecn_swin", {"pooling": "gem"}, "model.pooling: timm/ecn_swin has no average"),
        ("timm/resnet5", {}, r"'resnet5' is no network of timm .*; did you mean timm/resnet50"),
        ("timm/hf-hub:somebody/net", {}, "is no network of timm"),
        ("timm/ecn_vit+isc", {}, r"ends in \+isc; known are \+ics, \+parts, \+semantic"),
        ("timm/ecn_resnet+ics", {}, r"timm does not make timm/ecn_resnet\+ics for 64 x 32 pictures"),
        ("timm/ecn_vit+semantic", {}, "timm does not make"),
        ("timm/ecn_vit", {"mean": [0.5, 0.5, 0.5]}, "model.mean"),
        ("timm/ecn_vit", {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.0]}, "std above 0"),
    ],
)
def test_what_a_network_has_not_is_refused(arch: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone(arch, HEIGHT, WIDTH, **options)


def test_without_timm_the_extra_is_named() -> None:
    code = "import sys; sys.modules['timm'] = None; from ecn_dist.models import Backbone; "
    code += "Backbone('timm/resnet18', 64, 32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'ecn_dist[timm]'" in done.stderr


def test_batchnorms_that_are_activations_too_keep_them() -> None:
    from timm.layers import BatchNormAct2d

    norm, plain = BatchNormAct2d(3), BatchNormAct2d(3)
    batch = torch.randn(8, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    converted = convert_batchnorm(norm, "group", torch.device("cpu"), 8)
    for _ in range(2):
        torch.testing.assert_close(converted(batch), plain(batch))
    torch.testing.assert_close(converted.running_var, plain.running_var)
    torch.testing.assert_close(converted.eval()(batch), plain.eval()(batch))


def saved(backbone: Backbone, folder: Path) -> str:
    torch.save(backbone.body.state_dict() | {"head.weight": torch.zeros(1000, 24)}, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64)], ids=["square", "two to one"])
def test_position_embeddings_are_interpolated(height: int, width: int, tmp_path: Path) -> None:
    given, backbone = Backbone("timm/ecn_vit", height, width), Backbone("timm/ecn_vit", 96, 32)
    load_backbone(backbone, saved(given, tmp_path))
    grid = given.body.pos_embed[:, 1:].view(1, height // 16, width // 16, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (6, 2), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(backbone.body.pos_embed[:, 1:], wanted)
    assert torch.equal(backbone.body.pos_embed[:, :1], given.body.pos_embed[:, :1])
    again = Backbone("timm/ecn_vit", height, width)
    load_backbone(again, saved(given, tmp_path))
    torch.testing.assert_close(again.eval()(images(height, width)), given.eval()(images(height, width)))


def test_position_embeddings_of_an_unknown_grid_are_refused(tmp_path: Path) -> None:
    given, backbone = Backbone("timm/ecn_vit", 112, 16), Backbone("timm/ecn_vit", 64, 32)
    with pytest.raises(UserError, match="of another shape: pos_embed"):
        load_backbone(backbone, saved(given, tmp_path))


def test_biases_of_larger_windows_keep_their_offsets(tmp_path: Path) -> None:
    given, backbone = Backbone("timm/ecn_swin", 224, 224), Backbone("timm/ecn_swin", HEIGHT, WIDTH)
    load_backbone(backbone, saved(given, tmp_path))
    theirs, ours = (body.layers[1].blocks[0].attn for body in (given.body, backbone.body))
    assert (theirs.window_size, ours.window_size) == ((7, 7), (7, 4))
    a = theirs.relative_position_bias_table.view(13, 13, -1)
    b = ours.relative_position_bias_table.view(13, 7, -1)
    for down in range(-6, 7):
        for right in range(-3, 4):
            assert torch.equal(b[down + 6, right + 3], a[down + 6, right + 6])


def test_normalisation_of_its_own_is_applied_and_asked_for(tmp_path: Path) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
    backbone = Backbone("timm/ecn_vit", HEIGHT, WIDTH, mean=mean, std=std).eval()
    colours = torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def normalised(a: list[float], b: list[float]) -> torch.Tensor:
        return (colours - torch.tensor(a).double().view(3, 1, 1)) / torch.tensor(b).double().view(3, 1, 1)

    backbone.double()
    wanted = backbone.body(normalised(mean, std))
    by_imagenet = normalised([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(backbone(by_imagenet), wanted, rtol=1e-5, atol=1e-6)
    assert "from_imagenet" not in backbone.state_dict()

    method = torch.nn.Module()
    method.backbone = setting("timm/ecn_vit").backbone
    method.backbone.body.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(UserError, match=r"model.mean: .*weights.pth are normalised with mean \[0.5, 0.5, 0.5\]"):
        load_weights(method, saved(backbone, tmp_path))
