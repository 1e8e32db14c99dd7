"""Small networks under names of their own in torchvision's table, for runs that are the same with any network."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models._api import register_model


class ThinResNet(resnet.ResNet):
    """An eighth of the channels, a block a stage. Parts have ResNet's names; `fc`, which is cut off, does not fit."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def thin_resnet18(weights: None = None) -> nn.Module:
    return ThinResNet(resnet.BasicBlock, [1, 1, 1, 1])


def thin_resnet50(weights: None = None) -> nn.Module:
    return ThinResNet(resnet.Bottleneck, [1, 1, 1, 1])


class ThinConvNet(nn.Module):
    """Three convolutions: what the ranks exchange for each BatchNorm is what takes the time of a run."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, 10)"""
        return self.fc(self.avgpool(self.features(images)).flatten(1))


def thin_convnet(weights: None = None) -> nn.Module:
    return ThinConvNet()


for network in (thin_resnet18, thin_resnet50, thin_convnet):
    network.__module__ = resnet.__name__  # the table is searched by it
    register_model()(network)
