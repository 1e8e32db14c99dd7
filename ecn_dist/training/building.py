"""From a configuration to the objects of a run. The lower packages take plain values; here they get them."""

import socket
from pathlib import Path

import torch

from ecn_dist import distributed, methods
from ecn_dist.config import Config
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.fetch import shown
from ecn_dist.data.index import UNKNOWN_PID
from ecn_dist.data.plan import check_batch
from ecn_dist.data.reader import check_shards
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Method, Setting, TargetPictures
from ecn_dist.models import Backbone, check_statistics, convert_batchnorm, load_weights
from ecn_dist.ranking.evaluating import has_evaluation
from ecn_dist.reporting.model_card import fingerprint
from ecn_dist.training.feeding import Feeder
from ecn_dist.training.strategy import DataParallel, Strategy
from ecn_dist.training.tracking import log
from ecn_dist.training.trainer import Trainer

TRAINED = ("source", "target")
Domains = dict[str, ShardIndex]
"""Shard folders by "source", "target" and "validation", those that were given"""


def load_index(folder: str) -> ShardIndex:
    """A shard folder by its index, which must be the same on all ranks. Collective."""
    index = distributed.together(lambda: ShardIndex.load(folder))
    first, *others = distributed.gather_objects((socket.gethostname(), fingerprint(index)))
    for rank, (host, found) in enumerate(others, start=1):
        if found != first[1]:
            problem = f"rank {rank} on host {host} has other data under {shown(folder)} than rank 0 on host {first[0]}"
            raise UserError(f"{problem}; copy them anew", on_all_ranks=True)
    return index


def load_domains(config: Config) -> Domains:
    """The shard folders of a run, by their indices alone. Raises `UserError` for validation data that cannot choose."""
    given = {"source": config.source, "target": config.target, "validation": config.checkpoint.validation}
    domains = {name: ShardIndex.load(folder) for name, folder in given.items() if folder}
    if validation := domains.get("validation"):
        if not has_evaluation(validation):
            raise UserError(f"checkpoint.validation: {given['validation']} must have query and gallery")
        if _test_shards(validation) & _test_shards(domains.get("target")):
            found = f"{given['validation']} has shards of the target's query or gallery"
            remedy = "and the test's people choose nothing; pack others, as some of the training people kept apart"
            raise UserError(f"checkpoint.validation: {found}, {remedy}")
    return domains


def _test_shards(index: ShardIndex | None) -> set[str]:
    splits = [] if index is None else [index.split(name) for name in index.splits if name != "train"]
    return {shard.sha256 for split in splits for shard in split.shards}


def open_domains(config: Config) -> Domains:
    """`load_domains`, with each shard that is read there and of its size. Collective."""

    def load() -> Domains:
        domains, trained = load_domains(config), methods.entry(config.method).domains
        for name, index in domains.items():
            # The source's is trained on by whatever method takes one, and few folders have no other use.
            needed = {"train"} if name in trained or (name == "source" and "train" in index.splits) else set()
            check_shards(*map(index.split, needed | (set(index.splits) - {"train"} if name != "source" else set())))
        return domains

    return distributed.together(load)


def check_ranks(config: Config, world_size: int) -> None:
    """Raise `UserError` where the global batch cannot be cut for `world_size` ranks."""
    check_batch(config.global_batch_size, config.data.streams, world_size)
    model = config.model
    check_statistics(model.batchnorm, model.batchnorm_group, config.global_batch_size, world_size)


def build_backbone(config: Config) -> Backbone:
    """The backbone of `config`, its weights at random, on the CPU."""
    model, data = config.model, config.data
    neck = methods.load(config.method).NECK
    own = {"mean": model.mean, "std": model.std}
    return Backbone(model.arch, data.height, data.width, model.last_stride, model.pooling, neck, **own)


def build_method(config: Config, domains: Domains, device: torch.device) -> Method:
    """The method with its starting weights, equal on all ranks, on `device` (on "meta": its shapes alone).

    Raises `UserError` for an unknown network, for weights that do not fit it, and for data that do not suffice.
    """
    model = config.model
    torch.manual_seed(config.seed)
    splits = training_splits(domains)
    target = _pictures(splits["target"]) if "target" in splits else None  # data, on no meta device
    with torch.device("meta" if device.type == "meta" else "cpu"):
        method = methods.load(config.method)(
            Setting(
                backbone=build_backbone(config),
                num_identities=splits["source"].num_identities if "source" in splits else 0,
                target=target,
                global_batch_size=config.global_batch_size,
                epochs=config.epochs,
                source_only_epochs=config.optim.source_only_epochs,
                seed=config.seed,
                embedding_dim=model.embedding_dim,
                dropout=model.dropout,
                camera_style=config.data.camera_style,
                memory=config.memory,
                loss=config.loss,
                own=config.own.get(config.method),
                device=device,
                dtype=torch.float64 if config.precision == "fp64" else torch.float32,
            )
        )
    if device.type != "meta":
        for note in load_weights(method, model.weights):
            log.warning(note)
        method.started_from(model.weights)
    method.backbone.freeze(model.frozen_stages, model.shortcut_batchnorm_trains)
    if config.precision == "fp64":
        method.double()
    method.to(device)
    if device.type != "meta":
        convert_batchnorm(method, model.batchnorm, device, model.batchnorm_group)
        if model.channels_last:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return method


def _pictures(split: SplitIndex) -> TargetPictures:
    """What a method may know of the target's training pictures, by exemplar index."""
    exemplars_N = torch.from_numpy(split.indices)
    camids_N, pids_N = torch.empty(len(split), dtype=torch.int64), torch.empty(len(split), dtype=torch.int64)
    camids_N[exemplars_N] = torch.from_numpy(split.camids).long()
    pids_N[exemplars_N] = torch.from_numpy(split.pids).long()
    return TargetPictures(len(split), split.num_cameras, camids_N, pids_N if (pids_N != UNKNOWN_PID).any() else None)


def build_strategy(config: Config, method: Method, device: torch.device) -> Strategy:
    """The method's optimiser, precision and gradient exchange. Collective."""
    optim = config.optim
    groups = method.parameter_groups(lr=optim.lr, backbone_lr=optim.backbone_lr, layer_decay=optim.layer_decay)
    if optim.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, weight_decay=optim.weight_decay)
    else:
        momentum, nesterov = optim.momentum, optim.momentum > 0
        optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=optim.weight_decay, nesterov=nesterov)
    if config.engine == "ddp":
        return DataParallel(method, optimizer, precision=config.precision, device=device)
    idle = (name for source_only in (True, False) for name in method.idle_parameters(source_only))
    if config.optim.source_only_epochs and (name := next(idle, None)):
        remedy = "use engine ddp, or train with method source_only before, and start from its weights"
        raise UserError(f"engine: deepspeed would decay {name} while it is idle; {remedy}", on_all_ranks=True)
    from ecn_dist.training.deepspeed_strategy import DeepSpeed  # optional, and seconds to import

    return DeepSpeed(method, optimizer, config.precision, device, config.deepspeed.zero_stage)


def training_splits(domains: Domains) -> dict[str, SplitIndex]:
    """The training split of source and target, where they have one."""
    return {
        name: domains[name].split("train") for name in TRAINED if name in domains and "train" in domains[name].splits
    }


def build_trainer(config: Config, domains: Domains, device: torch.device, output_dir: Path) -> Trainer:
    """Method, strategy and streams of a run. Collective."""
    method = distributed.together(lambda: build_method(config, domains, device))
    splits, ranks = training_splits(domains), distributed.world_size()
    feeder = distributed.together(lambda: Feeder(config, method, splits, device, ranks))
    strategy = build_strategy(config, method, device)
    sizes = ", ".join(f"{name} {len(split)} pictures of {split.num_cameras} cameras" for name, split in splits.items())
    steps = feeder.timeline.steps_per_epoch
    log.info("%s on %d ranks on %s; %s; %d steps an epoch", config.method, ranks, device, sizes, steps)
    return Trainer(config, strategy, feeder, domains, output_dir)
