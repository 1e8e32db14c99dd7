"""Cluster memory with camera proxies (formulas.md: cluster).

Shape letters: b images of a feed here, n target pictures here, N on all ranks, D feature length, C clusters.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist import distributed
from ecn_dist.clustering import find_clusters
from ecn_dist.clustering.quality import cluster_figures
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.methods.base import Batches, Costs, Extract, Feed, Setting, Sizes, Step, Tensors, Transfer
from ecn_dist.methods.cluster.options import ClusterOptions
from ecn_dist.methods.source_only import SourceHead
from ecn_dist.models import normalized_features

PROXY_TEMPERATURE = 0.07
NUM_OTHER_PROXIES = 50


class Cluster(SourceHead):
    """Dai et al. 2022 on the partitioned memory, with the inter-camera loss of Wang et al. 2021 as an option."""

    NECK = True
    too_few_labels = "see the message about cluster.eps"  # `_check_clusters` comes first

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, with_head=setting.source_only_epochs > 0)
        assert setting.target is not None
        self.options: ClusterOptions = setting.own
        self.pictures = setting.target
        needed = setting.global_batch_size // self.options.instances * self.options.min_samples
        if self.pictures.num_pictures < needed:
            text = f"{self.pictures.num_pictures} training pictures, and the clusters of a batch have at least {needed}"
            remedy = "(global_batch_size / cluster.instances, of cluster.min_samples pictures); lower these"
            raise UserError(f"the target has {text} {remedy}")
        if self.options.source_weight:
            self.classifier = nn.Linear(self.backbone.num_features, setting.num_identities, bias=False)
            nn.init.normal_(self.classifier.weight, std=0.001)
        camera = ("loss_camera",) if self.options.camera_weight else ()
        source = ("loss_source",) if self.options.source_weight or setting.source_only_epochs else ()
        self.LOSSES = ("loss", "loss_cluster", *camera, *source)
        self._estimates_neck = setting.source_only_epochs > 0
        self.labels_N = torch.full((self.pictures.num_pictures,), -1, dtype=torch.int64, device="cpu")
        self._make_memories(num_clusters=0)

    def started_from(self, weights: str) -> None:
        # A network trained before without a neck, whose features the neck does not know yet.
        self._estimates_neck |= weights not in ("imagenet", "none")

    def idle_parameters(self, source_only: bool) -> Iterable[str]:
        idle = ("backbone.neck.", "classifier.") if source_only else ("embedding.", "source_head.")
        return (name for name, _ in self.named_parameters() if name.startswith(idle))

    def steps_per_epoch(self) -> int:
        return self.options.steps_per_epoch

    def feeds(self) -> tuple[Feed, ...]:
        batch_size, instances = self.setting.global_batch_size, self.options.instances
        style: Literal["random", "real"] = "random" if self.setting.camera_style else "real"
        target = Feed("target", "target", batch_size, instances, style, "pad")
        source = Feed("source", "source", batch_size, instances, augmentation="pad")
        return (source, target) if self.options.source_weight else (target,)

    # A step.

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Source logits, where there is a source, then the target's features (b, D) of unit length."""
        outputs = {"logits": self.classifier(self.backbone(images["source"]))} if "source" in images else {}
        return outputs | {"features": normalized_features(self.backbone, images["target"])}

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """L = L_cluster + camera_weight L_camera + source_weight L_source."""
        features_bD, target = outputs["features"], batches["target"]
        self._batch = self.memory.gather(features_bD, target.labels)
        losses = {"loss_cluster": self._batch.loss()}
        loss = losses["loss_cluster"]
        if self.options.camera_weight:
            self._proxy_batch = self.proxies.gather(features_bD, self.proxies_N[target.indices])
            own_b2 = self.own_proxies_C2[target.labels]
            losses["loss_camera"] = self._proxy_batch.proxy_loss(
                own_b2, target.camids, most_own=self.pictures.num_cameras, num_others=NUM_OTHER_PROXIES
            )
            loss = loss + self.options.camera_weight * losses["loss_camera"]
        if self.options.source_weight:
            losses["loss_source"] = F.cross_entropy(outputs["logits"], batches["source"].labels)
            loss = loss + self.options.source_weight * losses["loss_source"]
        return {"loss": loss} | losses

    def after_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        self._batch.update(self.options.momentum, skip=not took_step, hardest=self.options.hardest)
        if self.options.camera_weight:
            self._proxy_batch.update(self.options.proxy_momentum, skip=not took_step)

    # An epoch.

    def before_epoch(self, epoch: int, extract: Extract) -> dict[str, float]:
        """Features of all target pictures, clusters, and the memory's rows from the clusters' means."""
        if epoch == 0 and self._estimates_neck:
            self._estimate_neck(extract)
        options, camera_style = self.options, self.setting.camera_style
        pictures = extract(lambda images: normalized_features(self.backbone, images), copies=camera_style)
        indices_N = distributed.all_gather_uneven_rows(pictures.indices).cpu()
        camids_N = self.pictures.camids_N[indices_N]
        given = options.search_arguments(first=epoch == 0) | {"camids": camids_N if options.camera_aware else None}
        labels_N = find_clusters(pictures.features, sharded=True, **given).labels.cpu()
        pids_N = None if self.pictures.pids_N is None else self.pictures.pids_N[indices_N].numpy()
        figures = cluster_figures(labels_N.numpy(), camids_N.numpy(), pids_N)
        self._check_clusters(epoch, figures)
        self.labels_N[indices_N] = labels_N
        self._make_memories(int(figures["clusters"]))
        self.memory.load_means(pictures.features, self.labels_N[pictures.indices.cpu()].to(pictures.features.device))
        if options.camera_weight:
            self.proxies.load_means(pictures.features, self.proxies_N[pictures.indices])
        return figures

    def labels(self, feed: str) -> np.ndarray | None:
        return self.labels_N.numpy() if feed == "target" else None

    def _estimate_neck(self, extract: Extract) -> None:
        """Give the neck, where it has no statistics, those of the target's pooled features. Collective."""
        neck = self.backbone.neck
        if neck.num_batches_tracked:
            return
        features_nD = extract(self.backbone.pooled).features.double()
        count = distributed.all_reduce(torch.tensor(len(features_nD), dtype=torch.float64))
        mean_D = distributed.all_reduce(features_nD.sum(0)) / count
        var_D = distributed.all_reduce((features_nD - mean_D).square().sum(0)) / (count - 1)
        neck.load_state_dict({"running_mean": mean_D, "running_var": var_D}, strict=False)

    def _make_memories(self, num_clusters: int) -> None:
        """Memories of the clusters in `labels_N`: rows of zeros."""
        self.num_clusters = num_clusters
        self.memory = self._new_memory(num_clusters, self.setting.memory.temperature)
        if self.options.camera_weight:
            # A proxy for each (cluster, camera) that occurs: numbered by cluster, then by camera.
            key_N = self.labels_N * self.pictures.num_cameras + self.pictures.camids_N
            keys_P, proxies_N = torch.where(self.labels_N < 0, -1, key_N).unique(return_inverse=True)
            outliers = int((self.labels_N < 0).any())  # they come first
            self.proxies_N = (proxies_N - outliers).to(self.setting.device)
            clusters_P = keys_P[outliers:] // self.pictures.num_cameras
            counts_C = clusters_P.bincount(minlength=num_clusters)
            ends_C = counts_C.cumsum(0)
            self.own_proxies_C2 = torch.stack([ends_C - counts_C, ends_C], dim=1).to(self.setting.device)
            self.proxies = self._new_memory(len(clusters_P), PROXY_TEMPERATURE)

    def _new_memory(self, num_rows: int, temperature: float) -> ExemplarMemory:
        rows, setting = max(num_rows, 1), self.setting  # one before the first clusters
        return ExemplarMemory(rows, self.backbone.num_features, temperature, setting.device, setting.dtype)

    def _check_clusters(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Raise `UserError`, on all ranks alike, where no batch can be made of the clusters."""
        wanted = self.setting.global_batch_size // self.options.instances
        if figures["clusters"] >= wanted:
            return
        remedy = "Clusters have grown together: lower cluster.eps"
        if 2 * figures["outliers"] > self.pictures.num_pictures:
            first = "train on a source first (optim.source_only_epochs, or a trained network's model.weights)"
            remedy = f"Most pictures are near no other: raise cluster.eps, or {first}"
        raise UserError(
            f"epoch {epoch}: {figures['clusters']} clusters and {figures['outliers']} outliers of "
            f"{self.pictures.num_pictures} pictures at cluster.eps {self.options.eps:g}, and a batch takes {wanted} "
            f"clusters. {remedy}; or take fewer clusters a batch (global_batch_size / cluster.instances)",
            on_all_ranks=True,
        )

    # State.

    def sizes(self) -> dict[str, int]:
        proxies = self.proxies.num_exemplars if self.options.camera_weight else 0
        return {"clusters": self.num_clusters, "proxies": proxies}

    def resize(self, sizes: Mapping[str, int]) -> None:
        clusters, proxies, most = sizes.get("clusters", 0), sizes.get("proxies", 0), self.pictures.num_pictures
        if max(clusters, proxies) > most:
            raise _not_of_these(f"{clusters} clusters and {proxies} proxies of {most} pictures")
        self._make_memories(clusters)
        if self.options.camera_weight:
            self.proxies = self._new_memory(proxies, PROXY_TEMPERATURE)

    def memories(self) -> dict[str, ExemplarMemory]:
        return {"memory": self.memory} | ({"proxies": self.proxies} if self.options.camera_weight else {})

    def state(self) -> dict[str, Tensor]:
        return {"cluster.labels": self.labels_N} | super().state()

    def load_state(self, state: Tensors) -> None:
        labels_N, stored = state["cluster.labels"], self.sizes()
        least, most = labels_N.aminmax()
        if least < -1 or most >= self.num_clusters:
            raise _not_of_these(f"labels from {least} to {most} for {self.num_clusters} clusters")
        self.labels_N.copy_(labels_N)
        self._make_memories(self.num_clusters)
        if self.num_clusters and self.sizes() != stored:
            raise _not_of_these(f"{stored['proxies']} camera proxies where its labels make {self.sizes()['proxies']}")
        super().load_state(state)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        batch_size, instances = options["global_batch_size"], options["cluster.instances"]
        if batch_size % instances:
            raise UserError(f"cluster.instances: {instances} pictures do not divide global_batch_size ({batch_size})")
        for key in ("cluster.source_weight", "optim.source_only_epochs"):
            if options[key] and not options["source"]:
                raise UserError(f"{key}: {options[key]} needs a labelled source; give --source, or set it to 0")

    @classmethod
    def costs(cls, options: Mapping[str, Any], sizes: Sizes) -> Costs:
        """Without the rows of clusters, whose number is known only in training, and the features' exchange."""
        whole = options["global_batch_size"]
        similarities = Transfer("similarities", "all_to_all", whole * 3 * 8)
        softmax = Transfer("softmax", "all_gather", whole // sizes.world_size * 8)
        return Costs(transfers=(similarities, softmax), checkpoint_bytes=8 * sizes.num_pictures)

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        aware = "camera-aware " if options.get("cluster.camera_aware") else ""
        camera, source = (options.get(f"cluster.{name}_weight") for name in ("camera", "source"))
        proxies = f", with weight {camera:g} to its cluster's means in all cameras" if camera else ""
        more = f"; the source's identity loss counts with weight {source:g}" if source else ""
        return (
            f"Cluster memory: before each epoch the target's pictures are clustered by {aware}k-reciprocal neighbours "
            f"and DBSCAN (eps {options.get('cluster.eps')}), and each is drawn to its cluster's mean{proxies}{more}."
        )


def _not_of_these(problem: str) -> UserError:
    text = f"the checkpoint has {problem}: it is damaged, or of other data; take an earlier one, or start anew"
    return UserError(text, on_all_ranks=True)
