"""Checkpoints of the method's published code (2019): a torch file with `state_dict`, its memory in `state_dict_inv`.

Their names are `base.*` for the backbone, in torchvision's names, then `feat.*`, `feat_bn.*` and `classifier.*`, all
perhaps under `module.`; the memory's rows are `em` (N, D). N exemplars, D embedding dimension.
"""

import pickle
from pathlib import Path

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


def load_published_memory(file: str, num_exemplars: int, dim: int) -> Tensor:
    """The (N, D) memory rows of a checkpoint; row i is the i-th file name of the training folder, as ours is.

    Raises `UserError` for a file that has none, or has them in another shape.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"memory.start: there is no file {file} (model.weights) to take the memory's rows from")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"memory.start: {file} cannot be read as a file of plain tensors ({error})") from error
    inner = content.get(_MEMORY) if isinstance(content, dict) else None
    tensors = {key.removeprefix("module."): value for key, value in inner.items()} if isinstance(inner, dict) else {}
    rows_ND = tensors.get("em")
    if rows_ND is None:
        raise UserError(f"memory.start: {file} has no memory ({_MEMORY} with em); use zeros")
    if rows_ND.shape != (num_exemplars, dim):
        shapes = f"{tuple(rows_ND.shape)}, and the target and model.embedding_dim need {(num_exemplars, dim)}"
        raise UserError(f"memory.start: the memory in {file} is {shapes}; use zeros, or what it was made with")
    return rows_ND.detach()
