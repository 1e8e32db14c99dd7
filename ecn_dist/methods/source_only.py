"""Identity classification on the source: a method of its own, and the first epochs of others.

Shape letters: b images here, C backbone features, D embedding dimension, P source identities.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecn_dist.methods.base import Feed, Method, Setting, Step, Tensors
from ecn_dist.models import GlobalDropout


class Embedding(nn.Module):
    """Linear C -> D (Kaiming-normal, fan_out), then BatchNorm1d(D)."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, dim)
        self.batchnorm = nn.BatchNorm1d(dim)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled_bC: Tensor) -> Tensor:
        return self.batchnorm(self.linear(pooled_bC))


class SourceHead(Method):
    """A network with ECN's source head (formulas.md: Network), for all methods that have epochs on the source alone."""

    def __init__(self, setting: Setting, with_head: bool = True) -> None:
        """`with_head` False: there are no epochs on the source alone, and no head."""
        super().__init__(setting)
        if not with_head:
            return
        self.embedding = Embedding(self.backbone.num_features, setting.embedding_dim)
        self.source_head = nn.Linear(setting.embedding_dim, setting.num_identities)
        nn.init.normal_(self.source_head.weight, std=0.001)
        nn.init.zeros_(self.source_head.bias)
        self.source_dropout = GlobalDropout(setting.dropout, seed=setting.seed, site=0)

    def source_passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """ReLU(z) -> dropout -> linear: source images (b, 3, H, W) -> logits (b, P)."""
        z_bD = self.embedding(self.backbone.pooled(images["source"]))
        return {"logits": self.source_head(self.source_dropout(torch.relu(z_bD), at.number))}


class SourceOnly(SourceHead):
    """Cross entropy on the labelled source alone (formulas.md: source_only)."""

    def feeds(self) -> tuple[Feed, ...]:
        return (Feed("source", "source", self.setting.global_batch_size),)

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        return "Trained on the labelled source alone, by its identity loss; the target was for evaluation only."
