"""ECN's step: two passes, two losses, one update of the memory (docs/formulas.md, here and in what follows).

Shape letters: b images of a domain here, D embedding dimension, P source identities, N exemplars.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.methods.base import Batches, Costs, Feed, Setting, Sizes, Step, Tensors, Transfer, source_loss
from ecn_dist.methods.source_only import SourceHead
from ecn_dist.models import GlobalDropout, load_published_memory

ROW_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ECN(SourceHead):
    """Zhong et al. 2019, figure 2: one backbone and embedding, a source classifier, an exemplar memory."""

    LOSSES: tuple[str, ...] = ("loss", "loss_source", "loss_target")

    def __init__(self, setting: Setting) -> None:
        """Raises `UserError` for more neighbours than the target has training pictures."""
        super().__init__(setting)
        assert setting.target is not None
        self.target_dropout = GlobalDropout(setting.dropout, seed=setting.seed, site=1)
        self.weight, self.loss = setting.loss.target_weight, setting.loss
        num_exemplars = setting.target.num_pictures
        if self.loss.num_neighbors > num_exemplars:
            few = f"the target has only {num_exemplars} training pictures"
            raise UserError(f"loss.num_neighbors: {self.loss.num_neighbors}, but {few}; lower it")
        automatic = torch.float64 if setting.dtype == torch.float64 else torch.float32
        dtype, memory = ROW_DTYPES.get(setting.memory.dtype, automatic), setting.memory
        self.memory = ExemplarMemory(
            num_exemplars, setting.embedding_dim, memory.temperature, setting.device, dtype, backend=memory.backend
        )
        if setting.target.pids_N is not None:  # for the health figures, never for the loss
            self.memory.set_identities(setting.target.pids_N, setting.target.camids_N.int())

    def started_from(self, weights: str) -> None:
        if self.setting.memory.start == "weights":
            self.memory.load_full(load_published_memory(weights, self.memory.num_exemplars, self.memory.dim))

    def feeds(self) -> tuple[Feed, ...]:
        batch_size = self.setting.global_batch_size
        target = Feed("target", "target", batch_size, style="random" if self.setting.camera_style else "real")
        return Feed("source", "source", batch_size), target

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Source logits (b, P), then the target feature x = dropout(z / ||z||) (b, D), not of unit length.

        Each domain's pass has its own BatchNorm statistics; the running ones see both in that order.
        """
        outputs = self.source_passes(images, at)
        z_bD = self.embedding(self.backbone(images["target"]))
        return outputs | {"features": self.target_dropout(F.normalize(z_bD, dim=1), at.number)}

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """L = (1 - lambda) L_source + lambda L_target (formulas.md: Losses)."""
        if self.weight == 0:  # the control: the target passes, and only BatchNorm sees it
            loss_source = source_loss(outputs, batches)
            return {"loss": loss_source, "loss_source": loss_source, "loss_target": torch.zeros_like(loss_source)}
        # On its way during the source loss.
        self._batch = self.memory.gather(outputs["features"], batches["target"].indices)
        loss_source = source_loss(outputs, batches)
        num_neighbors = self.loss.num_neighbors if at.epoch >= self.loss.neighbors_from_epoch else 0
        loss_target = self._batch.loss(num_neighbors)
        loss = (1 - self.weight) * loss_source + self.weight * loss_target
        return {"loss": loss, "loss_source": loss_source, "loss_target": loss_target}

    def after_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        """v_y <- normalised(m v_y + (1 - m) x_i), m = memory.momentum * epoch (formulas.md: Memory update)."""
        if self.weight:
            self._batch.update(self.setting.memory.momentum * at.epoch, skip=not took_step)

    def memories(self) -> dict[str, ExemplarMemory]:
        return {"memory": self.memory}

    def health(self) -> dict[str, float]:
        return super().health() if self.weight else {}

    @classmethod
    def costs(cls, options: Mapping[str, Any], sizes: Sizes) -> Costs:
        keys = ("global_batch_size", "model.embedding_dim", "loss.num_neighbors")
        whole, dim, neighbors = (options[key] for key in keys)
        num_pictures, _, world_size, element = sizes
        batch, rows = whole // world_size, distributed.RowPartition(num_pictures, world_size).rows_per_rank
        row_dtype = ROW_DTYPES.get(options["memory.dtype"])
        row_bytes = dim * (row_dtype.itemsize if row_dtype else element) + 8  # and when it was written
        return Costs(
            memory={"memory rows": rows * row_bytes, "memory's pass": 3 * whole * dim * element},
            transfers=(
                Transfer("features", "all_gather", batch * (dim * element + 8)),
                Transfer("similarities, neighbours", "all_to_all", whole * (3 + 2 * neighbors) * 8),
                Transfer("softmax, neighbours", "all_gather", batch * (1 + neighbors) * 8),
                Transfer("features' gradients", "reduce_scatter", whole * dim * element),
            ),
            checkpoint_bytes=num_pictures * row_bytes,
            flops=4 * whole * rows * dim,  # similarities, weighted sum
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        base, epochs = options["memory.momentum"], options["epochs"]
        if (last := base * (epochs - 1)) >= 1:
            product = f"{base} times the last epoch ({epochs - 1}) is {last:g}"
            raise UserError(f"memory.momentum: {product}, and must stay below 1; lower memory.momentum or epochs")

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        weight = options.get("loss.target_weight")
        if weight is None:
            return ""
        if weight == 0:
            return "Control: the target's pictures pass through the network, but there is no target loss (lambda = 0)."
        neighbors, since = options.get("loss.num_neighbors"), options.get("loss.neighbors_from_epoch", 0)
        camera = "camera-invariance (C)" if options.get("data.camera_style") else ""
        near = f"neighbourhood-invariance (N, k = {neighbors}, from epoch {since})" if neighbors else ""
        *parts, last = filter(None, ("exemplar-invariance (E)", camera, near))
        joined = " and ".join(filter(None, (", ".join(parts), last)))
        return f"The source's identity loss, and with weight lambda = {weight:g} the target's loss with {joined}."
