"""Distributed training of domain adaptive person re-identification with an exemplar memory (ECN, CVPR 2019)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecn_dist.serving.embedder import Embedder

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """`from ecn_dist import Embedder`, loaded when asked for: importing the package alone does not import torch."""
    if name == "Embedder":
        from ecn_dist.serving.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
