"""Backbones by name: any torchvision classification network with a pooled feature, and `small_resnet`."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import difflib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

from ecn_dist.errors import UserError
from ecn_dist.models.pooling import GeM, Neck
from ecn_dist.models.small_resnet import SmallResNet

SMALL_RESNET = "small_resnet"
_CLASSIFIERS = ("fc", "classifier", "heads", "head")
_AUXILIARY = ("googlenet", "inception_v3")
_SHORTCUTS = ("downsample", "shortcut")


class Backbone(nn.Module):
    """A network cut before its classifier: (b, 3, H, W) -> pooled features (b, num_features).

    `body` keeps torchvision's parameter names. `stages` are its parts from the input on, what `freeze` counts.
    """

    def __init__(
        self, arch: str, height: int, width: int, last_stride: int = 2, pooling: str = "avg", neck: bool = False
    ) -> None:
        """With torch's random initialisation.

        Args:
            arch: `small_resnet`, or the name of a torchvision classification network.
            height, width: of the input, in pixels.
            last_stride: of the last stage; 1 keeps its map twice as high and wide (ResNets only).
            pooling: `avg`, or `gem` where the network pools a feature map by a module that can be exchanged.
            neck: put a BatchNorm on the pooled feature (`Neck`).

        Raises:
            UserError: for an unknown name, a network without a pooled feature at this input size, and options that
                the network does not have.
        """
        super().__init__()
        self.arch = arch
        self.last_stride = last_stride
        self.body = SmallResNet(last_stride) if arch == SMALL_RESNET else _without_classifier(arch)
        if last_stride != 2 and arch != SMALL_RESNET:
            _set_last_stride(arch, self.body, last_stride)
        if pooling == "gem":
            _pool_by_gem(arch, self.body)
        self.num_features = _measure_features(arch, self.body, height, width)
        self.neck = Neck(self.num_features) if neck else None
        # What is frozen is looked up when it is needed: the conversion of BatchNorms may replace modules at any time.
        self._num_frozen = 0
        self._shortcut_batchnorm_trains = False

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, num_features): the pooled feature, after the neck where there is one."""
        return self.pooled(images) if self.neck is None else self.neck(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, num_features), before the neck."""
        return self.body(images)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The parts of the network from its input on; for ResNets: the stem (conv1, bn1), then layer1 .. layer4."""
        children = dict(self.body.named_children())
        if "layer1" in children:
            return [[children["conv1"], children["bn1"]], *([children[f"layer{i}"]] for i in range(1, 5))]
        if self.arch == SMALL_RESNET:
            return [[children["stem"]], *([stage] for stage in children["stages"].children())]
        if "features" in children:
            return [[part] for part in children["features"].children() if not isinstance(part, GeM)]
        return [[part] for part in children.values()]

    def freeze(self, num_stages: int, shortcut_batchnorm_trains: bool) -> None:
        """Take the first `num_stages` stages out of training: no gradient, BatchNorms in evaluation mode.

        `shortcut_batchnorm_trains` leaves the BatchNorms of the frozen stages' shortcut convolutions
        (`layerN.0.downsample.1`) in training mode, as the published code does by a slip.
        """
        if not 0 <= num_stages <= len(self.stages):
            raise UserError(f"model.frozen_stages: {num_stages}, and {self.arch} has {len(self.stages)} stages")
        self._num_frozen, self._shortcut_batchnorm_trains = num_stages, shortcut_batchnorm_trains
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
            for name, module in part.named_modules():
                if self._shortcut_batchnorm_trains and isinstance(module, _BatchNorm):
                    module.train(mode and any(shortcut in name for shortcut in _SHORTCUTS))
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        return [part for stage in self.stages[: self._num_frozen] for part in stage]


def _without_classifier(arch: str) -> nn.Module:
    names = models.list_models(module=models)
    if arch not in names:
        near = difflib.get_close_matches(arch, [*names, SMALL_RESNET], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {SMALL_RESNET}, {', '.join(names)}"
        raise UserError(f"model.arch: {arch!r} is no torchvision classification network, nor {SMALL_RESNET}{hint}")
    if arch in _AUXILIARY:
        raise UserError(f"model.arch: {arch} trains with auxiliary classifiers, which have no loss here; use another")
    network = models.get_model(arch, weights=None)
    for name in _CLASSIFIERS:
        classifier = getattr(network, name, None)
        if classifier is not None:
            setattr(network, name, _without_linear(classifier))
            return network
    raise UserError(f"model.arch: {arch} has no classifier that could be cut off; use another, such as resnet50")


def _without_linear(classifier: nn.Module) -> nn.Module:
    """What of a classifier belongs to the pooled feature: norm and flattening, where it ends in one linear layer."""
    layers = list(classifier.children()) or [classifier]
    num_linear = sum(isinstance(layer, nn.Linear) for layer in layers)
    if num_linear == 0:
        raise UserError("model.arch: this network classifies by convolution and has no pooled feature; use another")
    if num_linear > 1:
        return nn.Identity()
    kept = [layer for layer in layers if not isinstance(layer, nn.Linear | nn.Dropout)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _set_last_stride(arch: str, body: nn.Module, stride: int) -> None:
    if not isinstance(body, models.ResNet):
        raise UserError(f"model.last_stride: {arch} is no ResNet and has none to set; use 2, or a ResNet")
    for module in body.layer4[0].modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (stride, stride)


def _pool_by_gem(arch: str, body: nn.Module) -> None:
    """In the place of the network's average; or before it, as the average over one position changes nothing."""
    average = getattr(body, "avgpool", None)
    if isinstance(average, nn.AdaptiveAvgPool2d) and average.output_size in (1, (1, 1)):
        body.avgpool = GeM()
    elif isinstance(body, models.MobileNetV2 | models.DenseNet):
        body.features.add_module("gem", GeM())
    else:
        raise UserError(f"model.pooling: {arch} has no average over a feature map that gem could replace; use avg")


@torch.no_grad()
def _measure_features(arch: str, body: nn.Module, height: int, width: int) -> int:
    try:
        features = body.eval()(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"model.arch: {arch} does not take {height} x {width} pictures ({error})") from error
    body.train()
    if features.dim() != 2:
        raise UserError(f"model.arch: {arch} gives features of shape {tuple(features.shape)}, not one pooled vector")
    return features.shape[1]
