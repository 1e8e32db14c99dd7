"""What every method is: a network with losses, and what it keeps beside its weights.

A method says which batches it wants (`feeds`), how they pass through the network (`passes`), what is minimised
(`losses`), what follows a step (`after_step`) and what precedes an epoch (`before_epoch`). Streams, ranks, precision,
checkpoints, signals, metrics and evaluation are the trainer's.

Shape letters: b images of a feed here, N target training pictures, D embedding dimension, P source identities.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecn_dist.data import Batch
from ecn_dist.memory import ExemplarMemory
from ecn_dist.methods.options import LossOptions, MemoryOptions
from ecn_dist.models import Backbone

SOURCE_LOSSES = ("loss", "loss_source")  # of a step on the source alone
Tensors = Mapping[str, Tensor]
Batches = Mapping[str, Batch]


class Step(NamedTuple):
    """A step's place in the run."""

    number: int  # from 0, over the whole run: with the seed, it names every random draw
    epoch: int  # from 0; -source_only_epochs .. -1 before that, on the source alone
    source_only: bool  # whether it belongs to the epochs on the source alone


@dataclass(frozen=True)
class Feed:
    """Batches that a method asks for, under the name by which its steps find them."""

    name: str
    domain: Literal["source", "target"]
    batch_size: int  # over all ranks, in samples
    # 0: shuffled passes; K: batches of K pictures of each of batch_size / K identities (or of `Method.labels`)
    instances: int = 0
    # as taken; in the style of a random camera; of a random other one; the picture with all its copies
    style: Literal["real", "random", "other", "all"] = "real"
    augmentation: Literal["ecn", "pad"] = "ecn"  # formulas.md: Training, or Augmentation of the clustering family
    sized_by: str = "global_batch_size"  # the option that sets its size, for errors


@dataclass(frozen=True)
class TargetPictures:
    """The target's training pictures, as far as a method may know them. N pictures, by exemplar index."""

    num_pictures: int
    num_cameras: int
    camids_N: Tensor  # int64
    pids_N: Tensor | None  # int64, -1 where unknown; for health figures alone, never for a loss. None without any


@dataclass(frozen=True)
class Setting:
    """A run as its method sees it: plain values."""

    backbone: Backbone
    num_identities: int  # of the source; 0 without one
    target: TargetPictures | None
    global_batch_size: int
    epochs: int
    source_only_epochs: int = 0
    seed: int = 0
    embedding_dim: int = 4096
    dropout: float = 0.5
    camera_style: bool = True
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    own: Any = None  # the method's own options
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32  # of parameters and losses


class Transfer(NamedTuple):
    """One collective of a step: the bytes a rank hands to it."""

    what: str
    operation: Literal["all_reduce", "all_gather", "all_to_all", "reduce_scatter"]
    payload: int


class Sizes(NamedTuple):
    """What costs depend on beside the options."""

    num_pictures: int  # N, of the target; 0 without one
    num_cameras: int  # of the target
    world_size: int
    element: int  # bytes of a parameter


@dataclass(frozen=True)
class Costs:
    """What a method costs beside its network, on the rank that has most of it."""

    memory: Mapping[str, int] = field(default_factory=dict)  # bytes on the device, beside the chunks of a pass
    transfers: tuple[Transfer, ...] = ()  # of a step, beside the gradients'
    checkpoint_bytes: int = 0  # of all ranks
    flops: int = 0  # of a step


class Method(nn.Module):
    """The network of a method, and the method itself. The state dict is the network's; `state` has the rest."""

    LOSSES: tuple[str, ...] = SOURCE_LOSSES  # names of what `losses` returns; "loss" is minimised, and all are logged
    EVALUATED: ClassVar[str] = ""  # the part that is evaluated and exported: a network with a `backbone`; "": this one
    NECK: ClassVar[bool] = False  # whether the evaluated feature is that of a BatchNorm neck on the pooled one
    too_few_labels: ClassVar[str] = ""  # end of the error where `labels` has too few for a batch: what to change

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.backbone = setting.backbone

    @property
    def evaluated(self) -> Backbone:
        """The backbone that is evaluated and exported."""
        return cast(Backbone, self.get_submodule(self.EVALUATED).backbone)

    # Before training.

    def parameter_groups(self, *, lr: float, backbone_lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups of the trained parameters: `Backbone.parameter_groups`, and all others at `lr`."""
        others = {id(p) for p in self.backbone.parameters()}
        new = [p for p in self.parameters() if p.requires_grad and id(p) not in others]
        groups = self.backbone.parameter_groups(backbone_lr, layer_decay)
        return [*groups, {"name": "new", "params": new, "lr": lr}] if new else groups

    def idle_parameters(self, source_only: bool) -> Iterable[str]:
        """Names of parameters that take no part in the epochs on the source alone, or in those that follow."""
        return ()

    def started_from(self, weights: str) -> None:
        """The network was filled from `model.weights`: take what else a file of that name holds."""

    def feeds(self) -> tuple[Feed, ...]:
        """The batches of a step, in the order in which they pass through the network."""
        raise NotImplementedError

    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None: as many as a pass over the source has."""
        return None

    # A step, as the trainer sees it.

    def forward(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """The passes of step `at`: by the names of the feeds, images (b, 3, H, W) -> what the losses need.

        All of a step goes through one call, so that a data-parallel wrapper sees one forward for one backward.
        """
        return self.source_passes(images, at) if at.source_only else self.passes(images, at)

    def step_losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """The losses of step `at`: those of `losses` or, on the source alone, its default."""
        return (Method if at.source_only else type(self)).losses(self, outputs, batches, at)

    def finish_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        """State changes that follow step `at`: those of `after_step`, or none on the source alone. Collective."""
        if not at.source_only:
            self.after_step(outputs, batches, took_step, at)

    # A step, as the method makes it.

    def source_passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        """Source images -> "logits" (b, P), for a step on the source alone. `methods.source_only.SourceHead` has it."""
        raise NotImplementedError

    def passes(self, images: Tensors, at: Step) -> dict[str, Tensor]:
        return self.source_passes(images, at)

    def losses(self, outputs: Tensors, batches: Batches, at: Step) -> dict[str, Tensor]:
        """Scalars of this rank, in the precision of the parameters; "loss" is what is minimised.

        Their mean over the ranks is the loss of the global batch. By default those of the source alone.
        """
        return dict.fromkeys(SOURCE_LOSSES, source_loss(outputs, batches))

    def after_step(self, outputs: Tensors, batches: Batches, took_step: bool, at: Step) -> None:
        """State changes that follow the optimiser's step, such as the update of a memory. Collective.

        Where the step was skipped because of an overflow, `took_step` is False, on all ranks alike.
        """

    # Epochs.

    def before_epoch(self, epoch: int, extract: "Extract") -> dict[str, float]:
        """What precedes an epoch, such as clusters of the target; returns figures for its line of metrics. Collective.

        Not called where a run continues in the middle of the epoch: what it made is in `state`.
        """
        return {}

    def labels(self, feed: str) -> np.ndarray | None:
        """(N,) int64, by exemplar index, from which a feed with `instances` is planned in this epoch; -1 takes no part.

        None for the source's identities.
        """
        return None

    # What is kept, and told.

    def sizes(self) -> dict[str, int]:
        """Numbers on which the shapes of `state` depend, for a checkpoint's meta data."""
        return {}

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Make `state` of the shapes that `sizes` told, before it is loaded."""

    def memories(self) -> dict[str, ExemplarMemory]:
        """The memories that are part of `state`, by name; `health` is that of "memory"."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What is kept beside the weights, for a checkpoint to write or to fill in place; DTensors where divided."""
        memories = self.memories().items()
        return {f"{name}.{key}": tensor for name, memory in memories for key, tensor in memory.state().items()}

    def load_state(self, state: Tensors) -> None:
        """Take over what `state` returned, once it was filled."""
        for name, memory in self.memories().items():
            own = f"{name}."
            memory.load_state({key.removeprefix(own): tensor for key, tensor in state.items() if key.startswith(own)})

    def health(self) -> dict[str, float]:
        """Figures for the log, named as in metrics.jsonl. Collective."""
        memory = self.memories().get("memory")
        return {f"memory_{name}": value for name, value in (memory.health() if memory else {}).items()}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise `UserError` for options, by dotted key, that do not go together in this method."""

    @classmethod
    def describe(cls, options: Mapping[str, Any]) -> str:
        """The method in a sentence or two, from a run's options by dotted key."""
        return (cls.__doc__ or cls.__name__).partition("\n")[0]

    @classmethod
    def costs(cls, options: Mapping[str, Any], sizes: Sizes) -> Costs:
        """What a run costs beside its network."""
        return Costs()


def source_loss(outputs: Tensors, batches: Batches) -> Tensor:
    """Cross entropy of the source's identities."""
    return F.cross_entropy(outputs["logits"], batches["source"].labels)


class Pictures(NamedTuple):
    """Features of this rank's target training pictures."""

    features: Tensor  # (n, D)
    indices: Tensor  # (n,) int64, exemplar indices


class Extract(Protocol):
    """Features of the target's training pictures, made by all ranks, each picture once. Collective."""

    def __call__(self, embed: Callable[[Tensor], Tensor], *, copies: bool = False) -> Pictures:
        """The ranks' parts, one after the other, are the split in its stored order.

        Args:
            embed: images (b, 3, H, W) -> features (b, D), called in evaluation mode and in the run's precision.
            copies: take the mean over a picture and its style copies, scaled to length 1.
        """
