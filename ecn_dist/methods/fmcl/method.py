"""FMCL's step: ECN's two passes and one of the momentum encoder, three losses (formulas.md: fmcl).

Shape letters: b images of a domain here, D embedding dimension, P source identities, N rows of the bank.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist.errors import UserError
from ecn_dist.methods.base import Batches, Costs, Setting, Sizes, Step, Tensors, source_loss
from ecn_dist.methods.ecn.method import ECN
from ecn_dist.methods.fmcl.options import FMCLOptions
from ecn_dist.methods.source_only import SourceHead
from ecn_dist.models import GlobalDropout, MomentumEncoder


class FMCL(ECN):
    """ECN's network, batches and schedule; positives and rows of the bank are a momentum encoder's features."""

    LOSSES = ("loss", "loss_source", "loss_target", "loss_soft")
    EVALUATED = "encoder.network"

    def __init__(self, setting: Setting) -> None:
        """Raises `UserError` for more neighbours than the target has training pictures."""
        super().__init__(setting)
        self.options: FMCLOptions = setting.own
        self.soft_dropout = GlobalDropout(setting.dropout, seed=setting.seed, site=2)
        self.encoder = MomentumEncoder(Embedder(self))

    def started_from(self, weights: str) -> None:
        self.encoder.update(self, 0.0)

    # A step.

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Source logits; then of the target, each from network and momentum encoder, features and source logits.

        The network's feature is dropout(z / ||z||), of which the loss needs the direction alone; the encoder's is z.
        """
        outputs = self.source_passes(images, at)
        z_bD = self.embedding(self.backbone(images["target"]))
        features_bD = self.target_dropout(F.normalize(z_bD, dim=1), at.number)
        logits_bP = self.source_head(self.soft_dropout(torch.relu(z_bD), at.number))
        positives_bD, soft_bP = self.encoder(images["target"])
        target = {"features": features_bD, "target_logits": logits_bP, "positives": positives_bD, "soft": soft_bP}
        return outputs | target

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """L = (1 - lambda) L_source + lambda L_target + soft_weight L_soft."""
        features_bD, positives_bD = (F.normalize(outputs[name], dim=1) for name in ("features", "positives"))
        batch = self.memory.gather(features_bD, batches["target"].indices)
        loss_source = source_loss(outputs, batches)
        num_neighbors = self.loss.num_neighbors if at.epoch >= self.loss.neighbors_from_epoch else 0
        loss_target = batch.bank_loss(positives_bD, num_neighbors)
        loss_soft = F.cross_entropy(outputs["target_logits"], outputs["soft"].softmax(dim=1))
        loss = (1 - self.weight) * loss_source + self.weight * loss_target + self.options.soft_weight * loss_soft
        return {"loss": loss, "loss_source": loss_source, "loss_target": loss_target, "loss_soft": loss_soft}

    def after_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        """Q_y <- e: with a momentum of 0 the memory takes the feature, normalised, as it is."""
        self.memory.gather(outputs["positives"], batches["target"].indices).update(0.0, skip=not took_step)

    def finish_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        super().finish_step(outputs, batches, took_step, at)
        options = self.options
        if took_step:  # on the source alone, too
            late = at.epoch >= options.momentum_from_epoch
            self.encoder.update(self, options.momentum if late else options.first_momentum)

    # What it tells.

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        if options["model.batchnorm"] == "local":
            raise UserError("model.batchnorm: with local statistics every rank would have its own encoder; take sync")

    @classmethod
    def costs(cls, options: Mapping[str, Any], sizes: Sizes) -> Costs:
        costs = super().costs(options, sizes)
        features, similarities, softmax, gradients = costs.transfers
        payload = options["global_batch_size"] * (2 + 2 * options["loss.num_neighbors"]) * 8
        return replace(
            costs,
            transfers=(
                features,
                similarities._replace(payload=payload),
                softmax._replace(payload=payload // sizes.world_size),
                gradients,
                features._replace(what="new rows"),
            ),
        )

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        weight, neighbors = options.get("loss.target_weight", 0), options.get("loss.num_neighbors")
        style = " in a random camera's style" if options.get("data.camera_style") else ""
        since = options.get("loss.neighbors_from_epoch", 0)
        more = f" (the {neighbors} nearest are positives too from epoch {since})" if neighbors else ""
        return (
            f"FMCL: the source's identity loss, and with weight lambda = {weight:g} the contrast of a target picture"
            f"{style}, its momentum encoder's feature as positive, with the other pictures' features{more}; its source "
            "logits follow the momentum encoder's, which is what is evaluated."
        )


class Embedder(nn.Module):
    """What the momentum encoder is a copy of: the backbone and heads of a method, under their names there."""

    def __init__(self, method: SourceHead) -> None:
        super().__init__()
        self.backbone, self.embedding, self.source_head = method.backbone, method.embedding, method.source_head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, H, W) -> z (b, D) and source logits (b, P), without dropout."""
        z_bD = self.embedding(self.backbone(images))
        return z_bD, self.source_head(torch.relu(z_bD))
