"""From a configuration to the objects of a run. The lower packages take plain values; here they get them."""

from collections.abc import Callable, Generator

import torch

from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.data import Augmentation, Batch, PassPlan, ShardIndex, SplitIndex, TrainStream
from ecn_dist.data.index import UNKNOWN_PID
from ecn_dist.data.reader import check_shards
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.models import Backbone, ReIDNetwork, convert_batchnorm, load_published_memory, load_weights
from ecn_dist.training.strategy import DataParallel, Strategy
from ecn_dist.training.timeline import Timeline
from ecn_dist.training.tracking import log

ROW_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_network(config: Config, num_identities: int, device: torch.device) -> ReIDNetwork:
    """The network with its starting weights, equal on all ranks, on `device`.

    Raises `UserError` for an unknown network and for weights that do not fit it.
    """
    model = config.model
    torch.manual_seed(config.seed)
    network = ReIDNetwork(
        Backbone(model.arch, config.data.height, config.data.width),
        embedding_dim=model.embedding_dim,
        num_identities=num_identities,
        dropout=model.dropout,
        seed=config.seed,
    )
    for note in load_weights(network, model.weights):
        log.warning(note)
    network.backbone.freeze(model.frozen_stages, model.shortcut_batchnorm_trains)
    if config.precision == "fp64":
        network.double()
    network.to(device)
    convert_batchnorm(network, model.batchnorm, device)
    return network


def build_strategy(config: Config, network: ReIDNetwork, device: torch.device) -> Strategy:
    """The network's optimiser, precision and gradient exchange. Collective."""
    optim = config.optim
    groups = network.parameter_groups(lr=optim.lr, backbone_lr=optim.backbone_lr)
    sgd = torch.optim.SGD(groups, momentum=optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.momentum > 0)
    if config.engine == "ddp":
        return DataParallel(network, sgd, precision=config.precision, device=device)
    from ecn_dist.training.deepspeed_strategy import DeepSpeed  # optional, and seconds to import

    return DeepSpeed(
        network,
        sgd,
        precision=config.precision,
        zero_stage=config.deepspeed.zero_stage,
        batch_size=config.global_batch_size // distributed.world_size(),
        device=device,
    )


def check_sizes(config: Config, batch: int, num_exemplars: int) -> None:
    """Refuse, before a run's first step, what would fail at a later one; `batch` is a rank's. Raises `UserError`."""
    if config.loss.num_neighbors > num_exemplars:
        raise UserError(
            f"loss.num_neighbors: {config.loss.num_neighbors}, but the target has only {num_exemplars} training "
            "pictures; lower it"
        )
    if config.model.batchnorm == "local" and batch == 1:
        raise UserError(
            "model.batchnorm: local statistics need at least 2 pictures of a domain on a rank, and here it is 1; "
            "use fewer ranks, a larger global_batch_size, or model.batchnorm sync"
        )


def build_memory(config: Config, target: SplitIndex, device: torch.device) -> ExemplarMemory:
    """The exemplar memory of a target's training split, this rank's part on `device`.

    Where the shards carry identities, the memory gets them for its health figures, never for the loss.
    """
    check_sizes(config, config.global_batch_size // distributed.world_size(), len(target))
    automatic = torch.float64 if config.precision == "fp64" else torch.float32
    memory = ExemplarMemory(
        len(target),
        config.model.embedding_dim,
        temperature=config.memory.temperature,
        device=device,
        dtype=ROW_DTYPES.get(config.memory.dtype, automatic),
        backend=config.memory.backend,
    )
    if (target.pids != UNKNOWN_PID).any():
        exemplars = torch.from_numpy(target.indices)
        pids_N = torch.empty(len(target), dtype=torch.int64)
        camids_N = torch.empty(len(target), dtype=torch.int32)
        pids_N[exemplars] = torch.from_numpy(target.pids)
        camids_N[exemplars] = torch.from_numpy(target.camids).int()
        memory.set_identities(pids_N, camids_N)
    if config.memory.start == "weights":
        memory.load_full(load_published_memory(config.model.weights, memory.num_exemplars, memory.dim))
    return memory


def _stream(
    config: Config, split: SplitIndex, domain: str, device: torch.device, random_erasing: float, camera_style: bool
) -> TrainStream:
    data = config.data
    labels = split.labels if domain == "source" else None
    plan = PassPlan(split.shard_samples, config.global_batch_size, data.streams, config.seed, domain, labels=labels)
    return TrainStream(
        split,
        plan,
        height=data.height,
        width=data.width,
        augmentation=Augmentation("ecn", random_erasing),
        style="random" if camera_style else "real",
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=data.workers,
        device=device,
        max_bad_samples=data.max_bad_samples,
    )


def build_streams(
    config: Config, source: SplitIndex, target: SplitIndex, device: torch.device
) -> tuple[Timeline, Callable[[int], tuple[Generator[Batch], Generator[Batch]]]]:
    """The run's timeline, and the function that opens both streams at a global step.

    An epoch is one pass over the source; the target's passes follow each other from the end of source-only training.
    """
    erasing = config.data.random_erasing
    source_stream = _stream(config, source, "source", device, erasing, camera_style=False)
    target_stream = _stream(config, target, "target", device, erasing, config.data.camera_style)
    timeline = Timeline(source_stream.steps_per_pass, config.optim.source_only_epochs, config.epochs)

    def streams(first_step: int) -> tuple[Generator[Batch], Generator[Batch]]:
        target_stream.start()  # its mistakes are to show now, not after source-only training
        before, total = timeline.source_only_steps, timeline.total_steps
        return (
            source_stream.batches(first_step, total),
            target_stream.batches(max(first_step - before, 0), total - before),
        )

    return timeline, streams


def adaptation_stream(config: Config, split: SplitIndex, device: torch.device) -> Generator[Batch]:
    """One pass over training pictures as they are, for `adapt_batchnorm`."""
    stream = _stream(config, split, "target", device, random_erasing=0.0, camera_style=False)
    return stream.batches(0, stream.steps_per_pass)


def open_domains(config: Config) -> tuple[ShardIndex, ShardIndex]:
    """Source and target shard folders, each shard there and of its size; a mistake on any rank is raised on all."""

    def load() -> tuple[ShardIndex, ShardIndex]:
        source, target = ShardIndex.load(config.source), ShardIndex.load(config.target)
        check_shards(source.split("train"), *target.splits.values())
        return source, target

    return distributed.together(load)
