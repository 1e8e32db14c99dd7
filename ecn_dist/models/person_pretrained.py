"""Checkpoints of networks pretrained on persons, known by the names of their tensors, as weights for networks of ours.

O outputs, C channels.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SEMANTIC_WEIGHT = 0.2  # of SOLIDER's appearance against its semantics, as its authors set it for re-identification
_HALF = (0.5, 0.5, 0.5)
_MOCO = "encoder_q."
_SWIN = {
    "patch_embed.projection.": "patch_embed.proj.",
    ".attn.w_msa.": ".attn.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
    "stages.": "layers.",
}


class Origin(NamedTuple):
    """What made a file, the mean and deviation of its pictures, and the `model.arch` that it is for, or one like it."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    arch: str


LUPERSON = Origin("MoCo (these are LUPerson's)", (0.3525, 0.3106, 0.3140), (0.2660, 0.2522, 0.2505), "resnet50")
TRANSREID = Origin("TransReID-SSL", _HALF, _HALF, "timm/vit_small_patch16_224+ics")
PASS = Origin("PASS", _HALF, _HALF, "timm/vit_small_patch16_224+ics+parts")
SOLIDER = Origin("SOLIDER", _HALF, _HALF, "timm/swin_tiny_patch4_window7_224+semantic")


def with_origin(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Origin | None]:
    """A network's tensors under our names, and where they come from; others as they are."""
    if any(key.startswith(_MOCO) for key in tensors):
        return {key.removeprefix(_MOCO): value for key, value in tensors.items() if key.startswith(_MOCO)}, LUPERSON
    if "part_token1" in tensors:
        return _with_registers(tensors), PASS
    if "patch_embed.conv.0.weight" in tensors:
        return tensors, TRANSREID
    if "stages.0.blocks.0.attn.w_msa.qkv.weight" in tensors:
        return _with_names_of_timm(tensors), SOLIDER
    return tensors, None


def _with_registers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PASS's part tokens and the five kinds of positions, as timm's register tokens and one table."""
    tokens = [f"part_token{part}" for part in (1, 2, 3)]
    positions = ["cls_pos", "part1_pos", "part2_pos", "part3_pos", "pos_embed"]
    ours = {key: value for key, value in tensors.items() if key not in (*tokens, *positions)}
    if all(key in tensors for key in (*tokens, *positions)):  # else they are told as missing
        ours["reg_token"] = torch.cat([tensors[key] for key in tokens], 1)
        ours["pos_embed"] = torch.cat([tensors[key] for key in positions], 1)
    return ours


def _with_names_of_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Swin with mmdetection's names. The semantic embedding goes into the downsampling that comes before it."""
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("stages."))
    ours = {}
    for key, tensor in tensors.items():
        stage = re.match(r"stages\.(\d+)\.downsample\.(.*)", key)
        if stage:
            ours[f"layers.{int(stage[1]) + 1}.downsample.{stage[2]}"] = _in_order_of_timm(tensor)
        elif key.startswith(f"norm{last}."):
            ours[key.replace(f"norm{last}", "norm")] = tensor
        elif not re.match(r"semantic_embed|norm\d", key):  # norms of maps that are not used
            for theirs, name in _SWIN.items():
                key = key.replace(theirs, name)
            ours[key] = tensor
    weights_2 = torch.tensor([SEMANTIC_WEIGHT, 1 - SEMANTIC_WEIGHT])
    for stage_number in range(last):
        embeddings = [f"semantic_embed_{kind}.{stage_number}" for kind in "wb"]
        reduction = f"layers.{stage_number + 1}.downsample.reduction"
        if all(f"{name}.weight" in tensors for name in embeddings) and f"{reduction}.weight" in ours:
            scale_O, shift_O = (tensors[f"{name}.weight"] @ weights_2 + tensors[f"{name}.bias"] for name in embeddings)
            ours[f"{reduction}.weight"] = F.softplus(scale_O)[:, None] * ours[f"{reduction}.weight"]
            ours[f"{reduction}.bias"] = shift_O
    return ours


def _in_order_of_timm(tensor: Tensor) -> Tensor:
    """(..., C x 2 x 2) -> (..., 4 x C), the four neighbours of a downsampling column by column."""
    return tensor.unflatten(-1, (-1, 2, 2)).permute(*range(tensor.dim() - 1), -1, -2, -3).flatten(-3)
