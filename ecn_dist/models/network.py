"""The network of ECN: backbone, embedding, source head.

Shape letters: b images here, C backbone features, D embedding dimension, P source identities.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist.models.backbones import Backbone
from ecn_dist.models.dropout import GlobalDropout

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


class ReIDNetwork(nn.Module):
    """Zhong et al. 2019, figure 2: one backbone and embedding, a source classifier, and the target feature.

    `forward` is one training step's two passes. Evaluation compares `normalized_features` of the backbone alone.
    """

    def __init__(
        self, backbone: Backbone, *, embedding_dim: int, num_identities: int, dropout: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.embedding = Embedding(backbone.num_features, embedding_dim)
        self.source_head = nn.Linear(embedding_dim, num_identities)
        nn.init.normal_(self.source_head.weight, std=0.001)
        nn.init.zeros_(self.source_head.bias)
        self.source_dropout = GlobalDropout(dropout, seed=seed, site=0)
        self.target_dropout = GlobalDropout(dropout, seed=seed, site=1)

    def forward(self, source_images: Tensor, target_images: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
        """Source (b, 3, H, W), target (b, 3, H, W) or None -> source logits (b, P), target features (b, D) or None.

        The two domains pass one after the other, each with its own BatchNorm statistics; the running statistics
        see both in that order. `step` names the dropout masks. Both go through one call, so that a data-parallel
        wrapper sees one forward for one backward.
        """
        logits_bP = self.source_logits(source_images, step)
        features_bD = None if target_images is None else self.target_features(target_images, step)
        return logits_bP, features_bD

    def source_logits(self, images: Tensor, step: int) -> Tensor:
        """ReLU(z) -> dropout -> linear: (b, 3, H, W) -> (b, P)."""
        z_bD = self.embedding(self.backbone(images))
        return self.source_head(self.source_dropout(torch.relu(z_bD), step))

    def target_features(self, images: Tensor, step: int) -> Tensor:
        """x = dropout(z / ||z||): (b, 3, H, W) -> (b, D). The dropout comes last, so x is not of unit length."""
        z_bD = self.embedding(self.backbone(images))
        return self.target_dropout(F.normalize(z_bD, dim=1), step)

    def parameter_groups(self, *, lr: float, backbone_lr: float) -> list[dict]:
        """Optimiser groups: the trained backbone parameters at `backbone_lr`, the new layers at `lr`."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        new = [*self.embedding.parameters(), *self.source_head.parameters()]
        groups = [{"name": "backbone", "params": backbone, "lr": backbone_lr}, {"name": "new", "params": new, "lr": lr}]
        return [group for group in groups if group["params"]]


def normalized_features(backbone: Backbone, images: Tensor) -> Tensor:
    """The evaluation feature f_pool / ||f_pool||: (b, 3, H, W) -> (b, C) of unit length, float32 or float64.

    Whatever precision the backbone ran in: rounded to bfloat16, lengths would be off by up to 0.2 %. Autocast may be
    on, since it lowers no operation of `normalize`.
    """
    pooled_bC = backbone(images)
    return F.normalize(pooled_bC if pooled_bC.dtype == torch.float64 else pooled_bC.float(), dim=1)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a network runs in `precision`, in training and outside it."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
