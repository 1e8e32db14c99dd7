"""A method in one file: cross entropy on the source, and the distance of the two domains' mean features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecn_dist.data import Batch
from ecn_dist.distributed import all_reduce
from ecn_dist.methods.base import Feed, Setting, Step, source_loss
from ecn_dist.methods.source_only import SourceHead
from ecn_dist.models import MomentumEncoder


@dataclass(frozen=True)
class ToyOptions:
    weight: float = 0.1
    """of the distance"""


class Toy(SourceHead):
    LOSSES = ("loss", "loss_source", "loss_distance")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.seen = torch.zeros((), dtype=torch.int64)

    def feeds(self) -> tuple[Feed, ...]:
        size = self.setting.global_batch_size
        return Feed("source", "source", size), Feed("target", "target", size)

    def passes(self, images: Mapping[str, Tensor], at: Step) -> dict[str, Tensor]:
        outputs = self.source_passes(images, at)
        return outputs | {"source": self.backbone(images["source"]), "target": self.backbone(images["target"])}

    def losses(self, outputs: Mapping[str, Tensor], batches: Mapping[str, Batch], at: Step) -> dict[str, Tensor]:
        source, distance = source_loss(outputs, batches), (outputs["source"].mean(0) - outputs["target"].mean(0)).norm()
        return {"loss": source + self.setting.own.weight * distance, "loss_source": source, "loss_distance": distance}

    def after_step(self, outputs: Any, batches: Mapping[str, Batch], took_step: bool, at: Step) -> None:
        self.seen += all_reduce(batches["target"].indices.sum())

    def state(self) -> dict[str, Tensor]:
        return {"toy.seen": self.seen}

    def health(self) -> dict[str, float]:
        return {"toy_seen": int(self.seen)}

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        return f"A toy that pulls the domains together with weight {options['toy.weight']}."


class MeanToy(Toy):
    """The same, evaluated by a momentum encoder, which stands still but on the source alone: there it is a copy."""

    EVALUATED = "encoder.network"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        copied = {"backbone": self.backbone, "embedding": self.embedding, "source_head": self.source_head}
        self.encoder = MomentumEncoder(nn.ModuleDict(copied))

    def finish_step(self, outputs: Any, batches: Mapping[str, Batch], took_step: bool, at: Step) -> None:
        super().finish_step(outputs, batches, took_step, at)
        self.encoder.update(self, 0.0 if at.source_only else 1.0)
