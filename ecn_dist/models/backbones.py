"""Backbones by name: any torchvision or timm classification network with a pooled feature, and `small_resnet`."""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import difflib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

from ecn_dist.errors import UserError
from ecn_dist.models.layers import GeM, Neck, drop_paths_globally
from ecn_dist.models.timm_networks import TIMM, build_timm

SMALL_RESNET = "small_resnet"
SMALL_CHANNELS = (32, 32, 64, 128, 256)  # of its stem and stages
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_COUNT = "num_batches_tracked"  # bookkeeping of BatchNorms that old files lack and that changes no result
_CLASSIFIERS = ("fc", "classifier", "heads", "head")
_AUXILIARY = ("googlenet", "inception_v3")
_SHORTCUTS = ("downsample", "shortcut")


class Backbone(nn.Module):
    """A network cut before its classifier: (b, 3, H, W) -> pooled features (b, num_features).

    Pictures come normalised with ImageNet's mean and deviation; those of other weights (`mean`, `std`) are applied to
    them here. `body` keeps the library's parameter names. `stages` are its parts from the input on, by their names in
    `body`: what `freeze` and the layers' learning rates count.
    """

    from_imagenet: Tensor | None  # (2, 3, 1, 1): what is added to and multiplied with pictures for other weights

    def __init__(
        self,
        arch: str,
        height: int,
        width: int,
        last_stride: int = 2,
        pooling: str = "avg",
        neck: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """With the library's random initialisation.

        Args:
            arch: `small_resnet`, the name of a torchvision classification network, or `timm/NAME` (timm_networks.py).
            height, width: of the input, in pixels.
            last_stride: of the last stage; 1 keeps its map twice as high and wide (ResNets only).
            pooling: `avg` (as the library does), or `gem` where the network averages a feature map by a module.
            neck: put a BatchNorm on the pooled feature (`Neck`).
            mean, std: of red, green and blue in 0 .. 1, which the weights were made with; None: ImageNet's.

        Raises `UserError` for an unknown name, no pooled feature at this size, and options that the network has not.
        """
        super().__init__()
        self.arch, self.last_stride = arch, last_stride
        if arch == SMALL_RESNET:
            self.body: nn.Module = SmallResNet(last_stride)
        else:
            self.body = build_timm(arch, height, width) if arch.startswith(TIMM) else _without_classifier(arch)
            if last_stride != 2:
                _set_last_stride(arch, self.body, last_stride)
        if pooling == "gem":
            _pool_by_gem(arch, self.body)
        drop_paths_globally(self.body)
        self.num_features = _measure_features(arch, self.body, height, width)
        self.neck: nn.Module = Neck(self.num_features) if neck else nn.Identity()
        self.stages = _stages(arch, self.body)
        # What is frozen is looked up when it is needed: the conversion of BatchNorms may replace modules at any time.
        self._num_frozen, self._shortcut_batchnorm_trains = 0, False
        self.normalisation_given = mean is not None
        self.mean, self.std = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
        if (mean is None) != (std is None) or not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise UserError(
                f"model.mean: {mean} with model.std {std}; give three numbers of each, std above 0, or none"
            )
        from_imagenet = None
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            both = torch.tensor([(IMAGENET_MEAN, IMAGENET_STD), (self.mean, self.std)])
            (their_mean, their_std), (own_mean, own_std) = both.view(2, 2, 3, 1, 1)
            from_imagenet = torch.stack([(their_mean - own_mean) / own_std, their_std / own_std])
        self.register_buffer("from_imagenet", from_imagenet, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, num_features): the pooled feature, after the neck where there is one."""
        return self.neck(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, num_features), before the neck."""
        if self.from_imagenet is not None:
            images = torch.addcmul(self.from_imagenet[0], images, self.from_imagenet[1])
        return self.body(images)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups of the trained parameters.

        Stage i of n has the learning rate `lr` * `layer_decay` ^ (n - 1 - i); what follows the last stage has `lr`.
        """
        last = len(self.stages) - 1
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                within = (any(f"{name}.".startswith(f"body.{part}.") for part in stage) for stage in self.stages)
                below = next((last - i for i, is_within in enumerate(within) if is_within), 0)
                groups.setdefault(below if layer_decay != 1 else 0, []).append(parameter)
        return [
            {"name": f"backbone-{power}" if power else "backbone", "params": group, "lr": lr * layer_decay**power}
            for power, group in groups.items()
        ]

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
            if isinstance(part, nn.Module):
                part.eval()
                for name, module in part.named_modules():
                    if self._shortcut_batchnorm_trains and isinstance(module, _BatchNorm):
                        module.train(mode and any(shortcut in name for shortcut in _SHORTCUTS))
        return self

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        return [attrgetter(name)(self.body) for stage in self.stages[: self._num_frozen] for name in stage]


def _stages(arch: str, body: nn.Module) -> list[list[str]]:
    """The names of each stage's parts; for ResNets: the stem (conv1, bn1), then layer1 .. layer4."""
    children = [name for name, _ in body.named_children()]
    if {"conv1", "bn1", "layer1"} <= set(children):
        return [["conv1", "bn1"], *([f"layer{i}"] for i in range(1, 5))]
    chains = ("stages", "blocks", "layers") if arch == SMALL_RESNET or arch.startswith(TIMM) else ()
    chain = "features" if "features" in children else next((name for name in children if name in chains), None)
    if chain is None:
        return [[name] for name in children]
    links = body.get_submodule(chain).named_children()
    parts = [[f"{chain}.{name}"] for name, part in links if not isinstance(part, GeM)]
    before = children[: children.index(chain)]
    if not before:
        return parts
    return [[*before, *(name for name, _ in body.named_parameters(recurse=False))], *parts]  # with tokens, positions


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
    """In the first block of `layer4`: of convolutions, and of the average before a shortcut's (ResNet-D)."""
    last_stage: Any = getattr(body, "layer4", None)
    layers = last_stage[0].modules() if last_stage is not None else ()
    strided = [layer for layer in layers if not any(layer.children()) and getattr(layer, "stride", 1) in (2, (2, 2))]
    fit = [
        isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.AvgPool2d) and layer.kernel_size in (2, (2, 2)))
        for layer in strided
    ]
    if not fit or not all(fit):
        raise UserError(f"model.last_stride: {arch} is no ResNet whose last stride can be set; use 2, or a ResNet")
    for module in strided:
        module.stride = (stride, stride)
        if isinstance(module, nn.AvgPool2d):
            module.kernel_size = (stride, stride)


def _pool_by_gem(arch: str, body: nn.Module) -> None:
    """In the place of the network's average; or before it, as the average over one position changes nothing."""
    average, of_timm = getattr(body, "avgpool", None), getattr(body, "global_pool", None)
    if isinstance(average, nn.AdaptiveAvgPool2d) and average.output_size in (1, (1, 1)):
        body.avgpool = GeM()
    elif isinstance(body, models.MobileNetV2 | models.DenseNet):
        body.features.add_module("gem", GeM())
    elif arch.startswith(TIMM) and getattr(of_timm, "pool_type", "") == "avg":
        body.global_pool = nn.Sequential(GeM(), nn.Flatten())
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


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, the basic block)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem and four stages of one residual block, each halving the picture; 1.2 million parameters, for 64 x 32.

    Small enough to train on one CPU core in seconds: the demo's backbone.
    """

    def __init__(self, last_stride: int = 2) -> None:
        super().__init__()
        first = SMALL_CHANNELS[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.Sequential(*map(ResidualBlock, SMALL_CHANNELS, SMALL_CHANNELS[1:], (2, 2, 2, last_stride)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> pooled features (b, 256)."""
        return self.avgpool(self.stages(self.stem(images))).flatten(1)
