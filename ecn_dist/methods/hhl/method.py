"""HHL's step: three passes, two losses (formulas.md: hhl).

Shape letters: b embeddings here, B on all ranks, T length of the triplets' embedding.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist import distributed
from ecn_dist.methods.base import Batches, Costs, Feed, Setting, Sizes, Step, Tensors, Transfer, source_loss
from ecn_dist.methods.hhl.options import HHLOptions
from ecn_dist.methods.options import check_streams
from ecn_dist.methods.source_only import SourceHead


class HHL(SourceHead):
    """Zhong et al. 2018: the source's identities, and triplets across cameras and domains."""

    LOSSES = ("loss", "loss_source", "loss_triplet")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.options: HHLOptions = setting.own
        self.triplet_head = nn.Linear(setting.embedding_dim, self.options.triplet_dim)
        nn.init.normal_(self.triplet_head.weight, std=0.001)
        nn.init.zeros_(self.triplet_head.bias)

    def idle_parameters(self, source_only: bool) -> Iterable[str]:
        return ("triplet_head.weight", "triplet_head.bias") if source_only else ()

    def feeds(self) -> tuple[Feed, ...]:
        options = self.options
        style: Literal["all", "real"] = "all" if self.setting.camera_style else "real"
        return (
            Feed("source", "source", self.setting.global_batch_size),
            Feed(
                *("identities", "source", options.source_identities * options.instances, options.instances),
                sized_by="hhl.source_identities",
            ),
            Feed("target", "target", options.target_pictures, style=style, sized_by="hhl.target_pictures"),
        )

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Source logits, then the triplets' embeddings of source identities and of target pictures with their copies.

        Each pass has BatchNorm statistics of its own; the running ones see all three in that order.
        """
        outputs = self.source_passes(images, at)
        for name in ("identities", "target"):
            outputs[name] = self.triplet_head(torch.relu(self.embedding(self.backbone(images[name]))))
        return outputs

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """L = L_source + triplet_weight L_triplet; a target picture and its copies are an identity of their own."""
        loss_source = source_loss(outputs, batches)
        target_b = self.setting.num_identities + batches["target"].indices
        labels_b = torch.cat([batches["identities"].labels, target_b])
        embeddings_bT = torch.cat([outputs["identities"], outputs["target"]])
        loss_triplet = triplet_loss(embeddings_bT, labels_b, self.options.margin)
        loss = loss_source + self.options.triplet_weight * loss_triplet
        return {"loss": loss, "loss_source": loss_source, "loss_triplet": loss_triplet}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        identities = options["hhl.source_identities"] * options["hhl.instances"]
        sizes = {"hhl.source_identities x hhl.instances": identities}
        check_streams(options, sizes | {"hhl.target_pictures": options["hhl.target_pictures"]})

    @classmethod
    def costs(cls, options: Mapping[str, Any], sizes: Sizes) -> Costs:
        views = sizes.num_cameras if options["data.camera_style"] else 1
        pictures = options["hhl.source_identities"] * options["hhl.instances"] + options["hhl.target_pictures"] * views
        payload = pictures // sizes.world_size * (options["hhl.triplet_dim"] * sizes.element + 8)
        return Costs(transfers=(Transfer("embeddings, identities", "all_gather", payload),))

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        text = "HHL: the source's identity loss"
        if not (weight := options.get("hhl.triplet_weight", 0)):
            return f"{text} alone; the target's pictures pass through the network, without a loss (control)."
        copies = " and a target picture's copies in other cameras' styles are its positives"
        text += f", and with weight {weight:g} a triplet loss in which source and target are negatives of each other"
        return f"{text}{copies if options.get('data.camera_style') else ''}."


def triplet_loss(embeddings_bT: Tensor, labels_b: Tensor, margin: float) -> Tensor:
    """The batch-hard triplet loss (Hermans et al. 2017) of the global batch, a scalar, the same on all ranks.

    Each embedding is an anchor: its farthest of the same label (itself, where there is no other) is to be nearer by
    `margin` than its nearest of another label. The gradient is that of the whole loss, times the number of ranks, as
    gradients are averaged over them. Collective: two all-gathers.
    """
    ranks, own = distributed.world_size(), distributed.rank()
    labels_B = distributed.all_gather_rows(labels_b)
    parts_WbT = list(distributed.all_gather_rows(embeddings_bT).chunk(ranks))
    parts_WbT[own] = embeddings_bT  # with its gradient
    embeddings_BT = torch.cat(parts_WbT)
    with torch.no_grad():
        distance_BB = torch.cdist(embeddings_BT, embeddings_BT, compute_mode="donot_use_mm_for_euclid_dist")
        is_same_BB = labels_B.unsqueeze(1) == labels_B
        farthest_B = distance_BB.masked_fill(~is_same_BB, -torch.inf).argmax(dim=1)
        nearest_B = distance_BB.masked_fill(is_same_BB, torch.inf).argmin(dim=1)
    positive_B, negative_B = (_distance(embeddings_BT, embeddings_BT[other_B]) for other_B in (farthest_B, nearest_B))
    loss = F.relu(positive_B - negative_B + margin).mean()
    return loss + (ranks - 1) * (loss - loss.detach())


def _distance(a_BT: Tensor, b_BT: Tensor) -> Tensor:
    """(B,) Euclidean, with a gradient of 0 between equals."""
    return (a_BT - b_BT).square().sum(dim=1).clamp(min=1e-12).sqrt()
