"""Distributed training of person re-identification on cameras without labels: ECN, clusters, on one engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecn_dist.serving.embedder import Embedder

__version__ = "0.2.0.dev0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """`from ecn_dist import Embedder`, loaded when asked for: importing the package alone does not import torch."""
    if name == "Embedder":
        from ecn_dist.serving.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
