"""Networks of timm (the extra `timm`) by name, made for the size of the input and cut before their classifier.

`timm/NAME+VARIANT` is the network NAME as it was changed for pretraining on persons:

    +ics        ViT whose patches are cut from three convolutions (TransReID-SSL's, PASS's)
    +parts      ViT with three more tokens, for parts of the body (PASS's); the feature is the class token's
    +semantic   Swin whose downsamplings have a bias, which takes up the semantic embedding (SOLIDER's)
"""

import difflib
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ecn_dist.errors import UserError

TIMM = "timm/"
_BIAS_TABLE = "relative_position_bias_table"


class HalfInstanceNorm(nn.Module):
    """IBN (Pan et al. 2018): InstanceNorm on the first half of the channels, BatchNorm on the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([self.IN(first), self.BN(second)], dim=1)


class ConvolutionalPatches(nn.Module):
    """Patch embedding after three convolutions, the first of stride 2 (ICS, Luo et al. 2021), in a ViT of timm."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.grid_size = img_size[0] // patch_size, img_size[1] // patch_size
        self.patch_size, self.num_patches = (patch_size, patch_size), math.prod(self.grid_size)
        layers: list[nn.Module] = []
        norms = (HalfInstanceNorm, HalfInstanceNorm, nn.BatchNorm2d)
        for given, kernel, norm in zip((in_chans, 64, 64), (7, 3, 3), norms, strict=True):
            convolution = nn.Conv2d(given, 64, kernel, stride=kernel // 3, padding=kernel // 2, bias=False)
            layers += [convolution, norm(64), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(64, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, patches, embed_dim)."""
        return self.proj(self.conv(images)).flatten(2).transpose(1, 2)


_VARIANTS: dict[str, Any] = {"ics": {"embed_layer": ConvolutionalPatches}, "parts": {"reg_tokens": 3}, "semantic": {}}


def build_timm(arch: str, height: int, width: int) -> nn.Module:
    """The network `arch`, with random weights. Raises `UserError` without timm, and for names that it does not know."""
    try:
        import timm
    except ImportError as error:
        needs = f"needs the package timm ({error}): pip install 'ecn_dist[timm]', or use a network of torchvision"
        raise UserError(f"model.arch: {arch} {needs}") from error
    name, *variants = arch.removeprefix(TIMM).split("+")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {TIMM}{f' or {TIMM}'.join(near)}?" if near else ""
        raise UserError(f"model.arch: {name!r} is no network of timm {timm.__version__}{hint}")
    if unknown := set(variants) - _VARIANTS.keys():
        raise UserError(f"model.arch: {arch} ends in +{unknown.pop()}; known are +{', +'.join(_VARIANTS)}")
    options = {key: value for variant in variants for key, value in _VARIANTS[variant].items()}
    create = functools.partial(timm.create_model, name, pretrained=False, num_classes=0, **options)
    try:
        try:
            body: Any = create(img_size=(height, width))
        except TypeError:  # it depends on no size of its input, and knows no such argument
            body = create()
        if "semantic" in variants:
            for layer in body.layers[1:]:
                reduction = layer.downsample.reduction
                layer.downsample.reduction = nn.Linear(reduction.in_features, reduction.out_features)
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.arch: timm does not make {arch} for {height} x {width} pictures ({error})") from error
    return body


def fit_to_input(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `body`, of whatever input they were made for: what depends on its size is fitted.

    Position embeddings are interpolated (their patches lie in a square, or twice as many in height as in width); of
    the position biases of larger windows the middle is taken, which has the same offsets.
    """
    fitted, wanted = dict(tensors), body.state_dict()
    for key, given in tensors.items():
        if key not in wanted or wanted[key].shape == given.shape:
            continue
        if key == "pos_embed" and given.dim() == 3:
            fitted[key] = _interpolate(given, wanted[key].shape[1], body.get_submodule("patch_embed").grid_size)
        elif key.endswith(_BIAS_TABLE):
            window: Any = body.get_submodule(key.removesuffix(f".{_BIAS_TABLE}")).window_size
            side, sizes = math.isqrt(len(given)), (2 * window[0] - 1, 2 * window[1] - 1)
            rows, columns = (slice((side - size) // 2, (side + size) // 2) for size in sizes)
            if side * side == len(given) and min(rows.start, columns.start) >= 0:
                fitted[key] = given.view(side, side, -1)[rows, columns].flatten(0, 1)
    return fitted


def _interpolate(given: Tensor, num_tokens: int, grid: Any) -> Tensor:
    """(1, prefix + patches, D) -> (1, num_tokens, D); unchanged where the given patches' grid is not known."""
    from timm.layers import resample_abs_pos_embed

    prefix = num_tokens - math.prod(grid)
    patches = given.shape[1] - prefix
    for ratio in (1, 2):
        width = math.isqrt(max(patches, 0) // ratio)
        if width and ratio * width * width == patches:
            return resample_abs_pos_embed(given, list(grid), [ratio * width, width], num_prefix_tokens=prefix)
    return given
