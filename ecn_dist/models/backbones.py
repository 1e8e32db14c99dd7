"""Backbones by name: any torchvision classification network with a pooled feature, and `small_resnet`."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import difflib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

from ecn_dist.errors import UserError
from ecn_dist.models.small_resnet import SmallResNet

SMALL_RESNET = "small_resnet"
_CLASSIFIERS = ("fc", "classifier", "heads", "head")


class Backbone(nn.Module):
    """A network cut before its classifier: (b, 3, H, W) -> pooled features (b, num_features).

    `body` keeps torchvision's parameter names. `stages` are its parts from the input on, what `freeze` counts.
    """

    def __init__(self, arch: str, height: int, width: int) -> None:
        """Raises `UserError` for an unknown name, or a network without a pooled feature at this input size."""
        super().__init__()
        self.arch = arch
        self.body = SmallResNet() if arch == SMALL_RESNET else _without_classifier(arch)
        self.num_features = _measure_features(arch, self.body, height, width)
        # What is frozen is looked up when it is needed: the conversion of BatchNorms may replace modules at any time.
        self._num_frozen = 0
        self._shortcut_batchnorm_trains = False

    def forward(self, images: Tensor) -> Tensor:
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
            return [[part] for part in children["features"].children()]
        return [[part] for part in children.values()]

    def freeze(self, num_stages: int, shortcut_batchnorm_trains: bool) -> None:
        """Take the first `num_stages` stages out of training: no gradient, BatchNorms in evaluation mode.

        `shortcut_batchnorm_trains` leaves the BatchNorms of the frozen stages' shortcut convolutions
        (`layerN.0.downsample.1`) in training mode, as the published code does by a slip.
        """
        if not 0 <= num_stages <= len(self.stages):
            raise UserError(
                f"model.frozen_stages: {num_stages} is out of range; {self.arch} has {len(self.stages)} stages"
            )
        self._num_frozen, self._shortcut_batchnorm_trains = num_stages, shortcut_batchnorm_trains
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
            for name, module in part.named_modules():
                if self._shortcut_batchnorm_trains and isinstance(module, _BatchNorm) and "downsample" in name:
                    module.train(mode)
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        return [part for stage in self.stages[: self._num_frozen] for part in stage]


def _without_classifier(arch: str) -> nn.Module:
    names = models.list_models(module=models)
    if arch not in names:
        near = difflib.get_close_matches(arch, [*names, SMALL_RESNET], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {SMALL_RESNET}, {', '.join(names)}"
        raise UserError(
            f"model.arch: {arch!r} is neither {SMALL_RESNET} nor a torchvision classification network{hint}"
        )
    network = models.get_model(arch, weights=None)
    for name in _CLASSIFIERS:
        classifier = getattr(network, name, None)
        if classifier is not None:
            setattr(network, name, _without_linear(classifier))
            return network
    raise UserError(
        f"model.arch: {arch} has no classifier that could be cut off; use another network, such as resnet50"
    )


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


@torch.no_grad()
def _measure_features(arch: str, body: nn.Module, height: int, width: int) -> int:
    training = body.training
    body.eval()
    try:
        features = body(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"model.arch: {arch} does not take {height} x {width} pictures ({error})") from error
    finally:
        body.train(training)
    if features.dim() != 2:
        raise UserError(f"model.arch: {arch} gives features of shape {tuple(features.shape)}, not one pooled vector")
    return features.shape[1]
