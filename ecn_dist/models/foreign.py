"""Files of other programs, known by the names of their tensors, as weights for networks of ours.

Checkpoints of networks pretrained on persons, and of the method's published code (2019). The latter are torch files
with `state_dict`, whose names are `base.*` for the backbone, in torchvision's names, then `feat.*`, `feat_bn.*` and
`classifier.*`, all perhaps under `module.`; and with a memory `state_dict_inv`, whose rows are `em`.

C channels, D embedding dimension, N exemplars, O outputs.
"""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist.errors import UserError

# What torch.load raises for bytes that are no file of tensors, besides its own errors.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
SEMANTIC_WEIGHT = 0.2  # of SOLIDER's appearance against its semantics, as its authors set it for re-identification
_MOCO = "encoder_q."
_MEMORY = "state_dict_inv"
_PUBLISHED = {"base": "", "feat": "embedding.linear.", "feat_bn": "embedding.batchnorm.", "classifier": "source_head."}
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


_HALF = (0.5, 0.5, 0.5)
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
    if any(key.startswith("base.") for key in tensors):
        return _with_names_of_export(tensors), None
    return tensors, None


def _with_registers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PASS's part tokens and the five kinds of positions, as timm's register tokens and one table."""
    tokens = ["part_token1", "part_token2", "part_token3"]
    joined = {"reg_token": tokens, "pos_embed": ["cls_pos", "part1_pos", "part2_pos", "part3_pos", "pos_embed"]}
    theirs = {key for keys in joined.values() for key in keys}
    ours = {key: value for key, value in tensors.items() if key not in theirs}
    if theirs <= tensors.keys():  # else they are told as missing
        ours |= {name: torch.cat([tensors[key] for key in keys], 1) for name, keys in joined.items()}
    return ours


def _with_names_of_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Swin with mmdetection's names. The semantic embedding goes into the downsampling that comes before it."""
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("stages."))
    ours = {}
    for key, tensor in tensors.items():
        stage = re.match(r"stages\.(\d+)\.downsample\.(.*)", key)
        if stage:
            # (..., C x 2 x 2) -> (..., 4 x C), the four neighbours of a downsampling column by column
            ordered = tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
            ours[f"layers.{int(stage[1]) + 1}.downsample.{stage[2]}"] = ordered
        elif key.startswith(f"norm{last}."):
            ours[key.replace(f"norm{last}", "norm")] = tensor
        elif not re.match(r"semantic_embed|norm\d", key):  # norms of maps that are not used
            for theirs, name in _SWIN.items():
                key = key.replace(theirs, name)
            ours[key] = tensor
    weights_2 = torch.tensor([SEMANTIC_WEIGHT, 1 - SEMANTIC_WEIGHT])
    for number in range(last):
        embeddings = [f"semantic_embed_{kind}.{number}" for kind in "wb"]
        reduction = f"layers.{number + 1}.downsample.reduction"
        if all(f"{name}.weight" in tensors for name in embeddings) and f"{reduction}.weight" in ours:
            scale_O, shift_O = (tensors[f"{name}.weight"] @ weights_2 + tensors[f"{name}.bias"] for name in embeddings)
            ours[f"{reduction}.weight"] = F.softplus(scale_O)[:, None] * ours[f"{reduction}.weight"]
            ours[f"{reduction}.bias"] = shift_O
    return ours


def _with_names_of_export(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code's network under the names of `export_weights`."""
    theirs = re.compile(rf"^({'|'.join(_PUBLISHED)})\.")
    renamed = {theirs.sub(lambda found: _PUBLISHED[found[1]], key): tensor for key, tensor in tensors.items()}
    # torch 0.4 did not count batches, and the count changes no result.
    if "embedding.batchnorm.running_mean" in renamed:
        renamed.setdefault("embedding.batchnorm.num_batches_tracked", torch.tensor(0))
    return renamed


def read_file(path: Path, option: str) -> Any:
    """What a torch file holds: tensors and plain values, and the parsed command line that some keep beside them.

    Raises `UserError`, naming the `option` that gave the file, for anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, OSError) as error:
        raise UserError(f"{option}: {path} cannot be read as a file of plain tensors ({error})") from error


def load_published_memory(file: str, num_exemplars: int, dim: int) -> Tensor:
    """The (N, D) memory rows of a checkpoint; row i is the i-th file name of the training folder, as ours is.

    Raises `UserError` for a file that has none, or has them in another shape.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"memory.start: there is no file {file} (model.weights) to take the memory's rows from")
    content = read_file(path, "memory.start")
    inner = content.get(_MEMORY) if isinstance(content, dict) else None
    named = inner.items() if isinstance(inner, dict) else ()
    rows_ND = {str(key).removeprefix("module."): value for key, value in named}.get("em")
    if not isinstance(rows_ND, Tensor) or not rows_ND.is_floating_point():
        raise UserError(f"memory.start: {file} has no memory ({_MEMORY} with em, floating point); use zeros")
    if rows_ND.shape != (num_exemplars, dim):
        shapes = f"{tuple(rows_ND.shape)}, and the target and model.embedding_dim need {(num_exemplars, dim)}"
        raise UserError(f"memory.start: the memory in {file} is {shapes}; use zeros, or what it was made with")
    return rows_ND.detach()
