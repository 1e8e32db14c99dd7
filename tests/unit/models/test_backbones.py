"""Options of the backbones: the last stride, the pooling, and what is refused."""

from pathlib import Path

import pytest
import torch

from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, fingerprint_backbone, load_backbone

HEIGHT, WIDTH = 64, 32


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


def last_map(backbone: Backbone, name: str) -> torch.Tensor:
    """(b, C, h, w): what the module `name` of the body gives."""
    maps = []
    handle = backbone.body.get_submodule(name).register_forward_hook(
        lambda _module, _inputs, output: maps.append(output)
    )
    backbone(images())
    handle.remove()
    return maps[0]


@pytest.mark.parametrize(
    ("arch", "name", "height"),
    [
        ("resnet18", "layer4", 4),
        ("resnet50", "layer4", 4),
        ("resnext50_32x4d", "layer4", 4),
        ("small_resnet", "stages.3", 4),
    ],
)
def test_last_stride_1_keeps_the_map_and_the_parameters(arch: str, name: str, height: int) -> None:
    torch.manual_seed(0)
    plain = Backbone(arch, HEIGHT, WIDTH).eval()
    torch.manual_seed(0)
    dense = Backbone(arch, HEIGHT, WIDTH, last_stride=1).eval()
    assert last_map(plain, name).shape[2:] == (height // 2, height // 4)
    found = last_map(dense, name)
    assert found.shape[2:] == (height, height // 2)
    torch.testing.assert_close(dense(images()), found.mean((2, 3)))
    assert fingerprint_backbone(plain, HEIGHT, WIDTH) != fingerprint_backbone(dense, HEIGHT, WIDTH)
    for (key, a), (_, b) in zip(plain.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("resnet18", "layer4"),
        ("small_resnet", "stages.3"),
        ("mobilenet_v2", "features.18"),
        ("densenet121", "features.norm5"),
        ("mobilenet_v3_small", "features"),
        ("efficientnet_b0", "features"),
    ],
)
def test_gem_pools_the_last_map(arch: str, name: str) -> None:
    backbone = Backbone(arch, HEIGHT, WIDTH, pooling="gem").eval()
    assert backbone.num_features == Backbone(arch, HEIGHT, WIDTH).num_features
    values = last_map(backbone, name).double().clamp(min=1e-6)
    wanted = values.pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(backbone(images()).double(), wanted, rtol=1e-4, atol=1e-6)
    powers = [parameter for key, parameter in backbone.named_parameters() if key.endswith(".p")]
    assert [power.item() for power in powers] == [3.0]
    backbone.freeze(len(backbone.stages) if arch == "mobilenet_v2" else 1, shortcut_batchnorm_trains=False)
    assert powers[0].requires_grad


def test_gem_takes_weights_with_and_without_its_power(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, gem, other = (Backbone("resnet18", HEIGHT, WIDTH, pooling=pooling) for pooling in ("avg", "gem", "gem"))
    torch.save(plain.body.state_dict(), tmp_path / "plain.pth")
    load_backbone(gem, str(tmp_path / "plain.pth"))
    assert torch.equal(gem.body.conv1.weight, plain.body.conv1.weight)
    with torch.no_grad():
        gem.body.avgpool.p.fill_(2.5)
    torch.save(gem.body.state_dict(), tmp_path / "gem.pth")
    load_backbone(other, str(tmp_path / "gem.pth"))
    assert other.body.avgpool.p.item() == 2.5
    with pytest.raises(UserError, match=r"unexpected: avgpool.p.*model.pooling"):
        load_backbone(plain, str(tmp_path / "gem.pth"))


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("mobilenet_v2", {"last_stride": 1}, "model.last_stride: mobilenet_v2 is no ResNet"),
        ("vgg11", {"pooling": "gem"}, "model.pooling: vgg11 has no average"),
        ("shufflenet_v2_x0_5", {"pooling": "gem"}, "model.pooling: shufflenet_v2_x0_5 has no average"),
        ("googlenet", {}, "googlenet trains with auxiliary classifiers"),
        ("inception_v3", {}, "inception_v3 trains with auxiliary classifiers"),
    ],
)
def test_what_a_network_has_not_is_refused(arch: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone(arch, HEIGHT, WIDTH, **options)


@pytest.mark.parametrize(
    ("arch", "shortcut"), [("resnet18", "layer2.0.downsample.1"), ("small_resnet", "stages.0.shortcut.1")]
)
def test_shortcut_batchnorms_of_frozen_stages_train_if_asked(arch: str, shortcut: str) -> None:
    backbone = Backbone(arch, HEIGHT, WIDTH)
    for trains in (True, False):
        backbone.freeze(3, shortcut_batchnorm_trains=trains)
        assert backbone.body.get_submodule(shortcut).training == trains
