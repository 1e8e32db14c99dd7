"""Checkpoints of the method's published code (2019): a torch file with `state_dict`, its memory in `state_dict_inv`.

Their names are `base.*` for the backbone, in torchvision's names, then `feat.*`, `feat_bn.*` and `classifier.*`, all
perhaps under `module.`; the memory's rows are `em` (N, D). N exemplars, D embedding dimension.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecn_dist.errors import UserError

_NAMES = {
    "base.": "",
    "feat.": "embedding.linear.",
    "feat_bn.": "embedding.batchnorm.",
    "classifier.": "source_head.",
}
_MEMORY = "state_dict_inv"
# What torch.load raises for bytes that are no file of tensors, besides its own errors.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)


def with_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors under an export's names, where they have the published code's; others as they are."""
    if not any(key.startswith("base.") for key in tensors):
        return tensors
    renamed = {}
    for key, tensor in tensors.items():
        theirs = next((prefix for prefix in _NAMES if key.startswith(prefix)), "")
        renamed[_NAMES.get(theirs, "") + key.removeprefix(theirs)] = tensor
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
    tensors = {str(key).removeprefix("module."): value for key, value in named}
    rows_ND = tensors.get("em")
    if not isinstance(rows_ND, Tensor) or not rows_ND.is_floating_point():
        raise UserError(f"memory.start: {file} has no memory ({_MEMORY} with em, floating point); use zeros")
    if rows_ND.shape != (num_exemplars, dim):
        shapes = f"{tuple(rows_ND.shape)}, and the target and model.embedding_dim need {(num_exemplars, dim)}"
        raise UserError(f"memory.start: the memory in {file} is {shapes}; use zeros, or what it was made with")
    return rows_ND.detach()
