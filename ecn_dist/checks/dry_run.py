"""The plan of a run for W ranks, without starting it: steps, batches, memory, traffic, arithmetic, checkpoints."""

import os
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ecn_dist.checks.host_checks import GIB, free_bytes, launched, writable_part
from ecn_dist.config import Config, flatten
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError
from ecn_dist.memory.rows_pass import default_chunk_bytes
from ecn_dist.methods import load
from ecn_dist.methods.base import Method, Sizes, Step, Transfer
from ecn_dist.methods.options import Count, Positive, Range, check_ranges
from ecn_dist.training.building import Domains, build_method, check_ranks, load_domains, training_splits
from ecn_dist.training.feeding import Feeder, pictures
from ecn_dist.training.timeline import Timeline

META = torch.device("meta")


@dataclass(frozen=True)
class Options:
    """with --dry_run: print the run's plan, start nothing"""

    world_size: Count | None = None
    """ranks (by default those of torchrun, or 1)"""
    images_per_second: Annotated[float, Range(least=1e-3, most=1e9)] | None = None
    """what all ranks do, as metrics.jsonl has it, to also print the time that the run takes"""
    gib_per_rank: Positive | None = None
    """refuse a plan that needs more device memory"""

    @classmethod
    def of(cls, parsed: Namespace) -> "Options | None":
        """From the options of `add_options`; None where no dry run is asked for."""
        given = {field.name: parsed[field.name] for field in fields(cls) if parsed[field.name] is not None}
        if given and not parsed.dry_run:
            raise UserError(f"--{min(given)} belongs to --dry_run; torchrun's --nproc_per_node sets the ranks of a run")
        options = cls(**given)
        check_ranges(options, "--")
        return options if parsed.dry_run else None


def add_options(parser: ArgumentParser) -> None:
    """Give the parser of `train` the dry run's options."""
    about = "print steps, batches, device memory, traffic, arithmetic, checkpoints of the run, and start nothing"
    parser.add_argument("--dry_run", action="store_true", help=about)
    parser.add_class_arguments(Options, None)


@dataclass(frozen=True)
class NetworkCost:
    """Counts of elements (not bytes), and floating point operations, of a rank's step on both domains."""

    parameters: int
    trained_parameters: int
    buffer_bytes: int  # BatchNorm statistics, their integer counters included
    activations: int  # kept for the backward pass, both domains
    batchnorm_channels: int  # of all BatchNorms that train
    flops: int  # forward and backward, both domains
    source_flops: int  # of a source-only step


def meta_method(config: Config, domains: Domains) -> Method:
    """The method of `config` on the meta device, without weights. `UserError` for a network that cannot be."""
    # A dropout's mask is drawn by a generator, which the meta device has not; `measure` counts it.
    return build_method(replace(config, model=replace(config.model, dropout=0.0)), domains, META).train()


def measure(config: Config, domains: Domains, world_size: int) -> NetworkCost:
    """The cost of a step on one of `world_size` ranks, found on torch's meta device: shapes alone, no arithmetic."""
    network, splits = meta_method(config, domains), training_splits(domains)
    size = (3, config.data.height, config.data.width)
    counts = {feed.name: pictures(feed, splits) // world_size for feed in network.feeds()}
    images = {name: torch.empty(count, *size, device=META) for name, count in counts.items()}
    alone = {"source": torch.empty(config.global_batch_size // world_size, *size, device=META)}
    own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later one gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as both:
        torch.stack([output.sum() for output in network(images, Step(0, 0, False)).values()]).sum().backward()
    with FlopCounterMode(display=False) as source_only:
        if config.optim.source_only_epochs:
            network(alone, Step(0, -1, True))["logits"].sum().backward()
    dropout_masks = sum(map(len, images.values())) * config.model.embedding_dim * bool(config.model.dropout)
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        trained_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        buffer_bytes=sum(b.numel() * b.element_size() for b in network.buffers()),
        activations=sum(storage.nbytes() for storage in kept.values()) // torch.empty(0).element_size() + dropout_masks,
        batchnorm_channels=sum(m.num_features for m in network.modules() if isinstance(m, _BatchNorm) and m.training),
        flops=both.get_total_flops(),
        source_flops=source_only.get_total_flops(),
    )


@dataclass(frozen=True)
class Plan:
    """A run's figures for `world_size` ranks; those of a rank are the largest over the ranks."""

    world_size: int
    timeline: Timeline
    batch_per_rank: int
    num_exemplars: int
    network: NetworkCost
    memory: dict[str, int]  # bytes on a rank's device
    transfers: tuple[Transfer, ...]  # of a step with both losses
    checkpoint_bytes: int
    checkpoints: int
    flops_per_rank: int  # of the whole run
    images: int  # of the whole run, over all ranks

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints that are kept, and one more while the newest is being written."""
        return self.checkpoint_bytes * (self.checkpoints + 1)

    @property
    def sent_bytes(self) -> int:
        return sum(sent(transfer, self.world_size) for transfer in self.transfers)


def sent(transfer: Transfer, world_size: int) -> int:
    """Bytes that a rank sends, by the ring algorithms (Thakur et al. 2005)."""
    others = world_size - 1
    factor = {"all_reduce": 2 * others, "all_gather": others * world_size}.get(transfer.operation, others)
    return transfer.payload * factor // world_size


def make_plan(config: Config, world_size: int) -> Plan:
    """The plan of the run that `config` describes, which has passed `check`.

    Reads the shard folders' indices, no picture and no weights. Raises `UserError` where the run could not go to its
    end: sizes that do not divide, splits that are too small or lack styles, more neighbours than exemplars.
    """
    check_ranks(config, world_size)
    domains = load_domains(config)
    network = measure(config, domains, world_size)
    feeder = Feeder(config, meta_method(config, domains), training_splits(domains), torch.device("cpu"), world_size)
    target = domains["target"].split("train") if "target" in domains else None
    num_exemplars, num_cameras = (len(target), target.num_cameras) if target is not None else (0, 0)
    element = 8 if config.precision == "fp64" else 4
    costs = load(config.method).costs(flatten(config), Sizes(num_exemplars, num_cameras, world_size, element))
    alone_steps = feeder.timeline.source_only_steps
    own_steps = feeder.timeline.total_steps - alone_steps
    images = feeder.images(Step(0, 0, False))  # of a step
    moments = {"sgd": 1, "adam": 2}[config.optim.optimizer]  # numbers that it keeps of each parameter
    parameters, gradients = network.parameters * element + network.buffer_bytes, network.trained_parameters * element
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.accelerator.is_available())
    memory = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": moments * gradients,
        # Under autocast nearly all that is kept for the backward pass is in half precision.
        "activations": network.activations * (2 if config.precision in ("bf16", "fp16") else element),
        "pictures": images // world_size * 3 * config.data.height * config.data.width * (4 + 1),
        "chunk of memory rows": default_chunk_bytes(torch.device("cpu" if on_cpu else "cuda")),
    }
    transfers = [Transfer("gradients", "all_reduce", gradients)]
    if config.model.batchnorm == "sync":
        # Mean and square sum of every channel, for each pass: there and, for the backward pass, back.
        each_way = len(feeder.feeds) * 2 * network.batchnorm_channels * element
        transfers.append(Transfer("BatchNorm, forward", "all_gather", each_way))
        transfers.append(Transfer("BatchNorm, backward", "all_reduce", each_way))
    return Plan(
        world_size=world_size,
        timeline=feeder.timeline,
        batch_per_rank=config.global_batch_size // world_size,
        num_exemplars=num_exemplars,
        network=network,
        memory=memory | dict(costs.memory),
        transfers=(*transfers, *costs.transfers) if world_size > 1 else (),
        checkpoint_bytes=parameters + moments * gradients + costs.checkpoint_bytes,
        checkpoints=config.checkpoint.keep + config.checkpoint.keep_best + len(config.checkpoint.keep_epochs),
        flops_per_rank=own_steps * (network.flops + costs.flops) + alone_steps * network.source_flops,
        images=alone_steps * config.global_batch_size + own_steps * images,
    )


def check_fits(plan: Plan, config: Config, options: Options) -> None:
    """Raise `UserError` where a rank's device or the run folder's disk is too small for the plan."""
    limit, where = None, ""
    if options.gib_per_rank is not None:
        limit, where = options.gib_per_rank * GIB, "--gib_per_rank"
    elif config.device != "cpu" and torch.accelerator.is_available():
        limit, where = torch.accelerator.get_memory_info(0)[1], "the accelerator of this host"
    if limit is not None and plan.memory_bytes > limit:
        largest = max(plan.memory, key=lambda name: plan.memory[name])
        raise UserError(
            f"a rank needs {_size(plan.memory_bytes)}, and {where} gives {_size(limit)}; the largest part is {largest} "
            f"({_size(plan.memory[largest])}). Use more ranks, a smaller batch, precision bf16 or memory.dtype bf16"
        )
    if (free := free_bytes(writable_part(Path(config.output_dir)))) < plan.disk_bytes:
        raise UserError(
            f"output_dir: {config.output_dir} has {_size(free)} free, and {plan.checkpoints + 1} checkpoints of "
            f"{_size(plan.checkpoint_bytes)} need {_size(plan.disk_bytes)}; make room, or lower checkpoint.keep"
        )


def describe(plan: Plan, config: Config, options: Options) -> str:
    """The plan as text."""
    timeline, network, world_size = plan.timeline, plan.network, plan.world_size
    lines = [
        ("ranks", f"{world_size}"),
        ("epochs", f"{timeline.source_only_epochs} on the source alone, then {timeline.epochs}"),
        ("steps", f"{timeline.steps_per_epoch} an epoch, {timeline.total_steps} in all"),
        ("batch", f"{plan.batch_per_rank} images of each domain on a rank, {config.global_batch_size} on all"),
        ("exemplars", f"{plan.num_exemplars}, {RowPartition(plan.num_exemplars, world_size).size(0)} on a rank"),
        ("parameters", f"{network.parameters / 1e6:.2f} M, of which {network.trained_parameters / 1e6:.2f} M train"),
        ("memory", f"{_size(plan.memory_bytes)} a rank, beside what the driver takes:"),
        *(("", f"{_size(size):>12}  {name}") for name, size in plan.memory.items()),
        ("network", f"{_size(plan.sent_bytes)} sent by a rank in a step" + (":" if plan.transfers else "")),
        *(("", f"{_size(sent(t, world_size)):>12}  {t.what} ({t.operation})") for t in plan.transfers),
        ("arithmetic", f"{plan.flops_per_rank / 1e12:.4g} TFLOP a rank in the whole run"),
        ("checkpoint", f"{_size(plan.checkpoint_bytes)}, of which at most {plan.checkpoints} are kept"),
    ]
    if options.images_per_second:
        took = timedelta(seconds=round(plan.images / options.images_per_second))
        lines.append(("time", f"{took} at {options.images_per_second:g} images/s, without evaluation and checkpoints"))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def run(config: Config, options: Options) -> None:
    """Print the plan of `config`, which has passed `check`. Raises `UserError` where it cannot be carried out."""
    plan = make_plan(config, options.world_size or launched("WORLD_SIZE", 1))
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        print(describe(plan, config, options), flush=True)
    check_fits(plan, config, options)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
