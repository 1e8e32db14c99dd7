"""Import this before torchvision: it makes PyPI's torchvision import on a CPU-only torch.

PyPI's torchvision wheel is built against CUDA torch. Beside a CPU build of torch it cannot load its compiled
operators, and its import fails with "operator torchvision::nms does not exist", because it registers shape functions
for operators that are not there. Declaring the two schemas is enough for everything that does not call them
(networks, weights, transforms). Where the compiled operators load, this module does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _operators_load() -> bool:
    """Whether torchvision's compiled operators load here, asked the way torchvision itself does."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # no torchvision: its own import error says so best
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


def declare_missing_operators() -> None:
    """Declare the schemas torchvision expects, where its compiled library does not load. May be called again."""
    if _operators_load():
        return
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)


declare_missing_operators()
