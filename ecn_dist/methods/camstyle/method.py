"""CamStyle's step: real pictures, then style copies (formulas.md: camstyle).

Shape letters: b images of a feed here, P source identities.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist.methods.base import Batches, Feed, Setting, Step, Tensors, source_loss
from ecn_dist.methods.camstyle.options import CamStyleOptions
from ecn_dist.methods.options import check_streams
from ecn_dist.methods.source_only import SourceHead
from ecn_dist.models import GlobalDropout


class CamStyle(SourceHead):
    """Zhong et al. 2018: identity classification of real pictures and, with smoothed targets, of style copies."""

    LOSSES = ("loss", "loss_source", "loss_copies")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.options: CamStyleOptions = setting.own
        self.copies_dropout = GlobalDropout(setting.dropout, seed=setting.seed, site=1)

    def feeds(self) -> tuple[Feed, ...]:
        style: Literal["other", "real"] = "other" if self.setting.camera_style else "real"
        copies = Feed("copies", "source", self.options.copies, style=style, sized_by="camstyle.copies")
        return Feed("source", "source", self.setting.global_batch_size), copies

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Logits (b, P) of the real pictures, then of the copies, each with BatchNorm statistics of its own."""
        outputs = self.source_passes(images, at)
        z_bD = self.embedding(self.backbone(images["copies"]))
        return outputs | {"copies": self.source_head(self.copies_dropout(torch.relu(z_bD), at.number))}

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """L = L_source + L_copies: means over either batch, whatever their sizes."""
        loss_source, smoothing = source_loss(outputs, batches), self.options.smoothing
        loss_copies = F.cross_entropy(outputs["copies"], batches["copies"].labels, label_smoothing=smoothing)
        return {"loss": loss_source + loss_copies, "loss_source": loss_source, "loss_copies": loss_copies}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        check_streams(options, {"camstyle.copies": options["camstyle.copies"]})

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        shown = "copies in other cameras' styles" if options.get("data.camera_style") else "more of them (control)"
        return (
            f"CamStyle: identity classification of labelled pictures and of {shown}, with targets smoothed by "
            f"{options.get('camstyle.smoothing', 0):g}; the target was for evaluation only."
        )
