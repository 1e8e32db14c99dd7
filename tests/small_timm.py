"""Networks of timm's own classes, small enough for tests, under names of their own. To be imported where timm is."""

from typing import Any

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision, which timm imports)

# isort: split
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

NAMES = ("ecn_vit", "ecn_swin", "ecn_convnext", "ecn_resnet")
_OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _OF_TIMM}


@register_model
def ecn_vit(pretrained: bool = False, **options: Any) -> nn.Module:
    return VisionTransformer(patch_size=16, embed_dim=24, depth=3, num_heads=2, **_own(options))


@register_model
def ecn_swin(pretrained: bool = False, **options: Any) -> nn.Module:
    return SwinTransformer(patch_size=4, embed_dim=8, depths=(2, 1, 1), num_heads=(1, 2, 2), **_own(options))


@register_model
def ecn_convnext(pretrained: bool = False, **options: Any) -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), **_own(options))


@register_model
def ecn_resnet(pretrained: bool = False, **options: Any) -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 16, 16, 24), stem_width=8, **_own(options))
