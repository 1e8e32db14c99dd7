"""The plan of a run for W ranks, without starting it: steps, batches, memory, network traffic, time, checkpoint size.

Shape letters: b images of a domain on a rank, B on all W ranks, D embedding dimension, N exemplars, C channels.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ecn_dist.checks.network_cost import NetworkCost, measure, meta_method
from ecn_dist.config import Config, flatten
from ecn_dist.data import ShardIndex
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError
from ecn_dist.memory.rows_pass import default_chunk_bytes
from ecn_dist.methods import load
from ecn_dist.methods.base import Transfer
from ecn_dist.training.building import check_ranks, training_splits
from ecn_dist.training.feeding import Feeder
from ecn_dist.training.timeline import Timeline

GIB = 2**30
CPU = torch.device("cpu")

# Floating point operations a second that a rank is assumed to sustain, where no measured figure is given: (CPU with a
# few cores, accelerator). Half precision by tensor cores.
ASSUMED_FLOPS = {"fp64": (2e10, 5e12), "fp32": (5e10, 2e13), "bf16": (5e10, 8e13), "fp16": (5e10, 8e13)}


@dataclass(frozen=True)
class Options:
    """What `--dry_run` takes beside a run's own options."""

    world_size: int
    images_per_second: float | None = None
    gib_per_rank: float | None = None


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

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> int:
        return sum(sent(transfer, self.world_size) for transfer in self.transfers)


def sent(transfer: Transfer, world_size: int) -> int:
    """Bytes that a rank sends, by the ring algorithms (Thakur et al. 2005)."""
    others = world_size - 1
    factor = {"all_reduce": 2 * others, "all_gather": others * world_size}.get(transfer.operation, others)
    return transfer.payload * factor // world_size


HELP = (
    "With --dry_run nothing is started and the run's plan is printed: steps, batches, device memory, network traffic, "
    "checkpoint size, time. It takes --world_size W (default: torchrun's ranks, or 1), --images_per_second X (of all "
    "ranks, as metrics.jsonl has it, for the time), and --gib_per_rank G (refuse a plan that needs more device memory)."
)


def split_options(argv: list[str]) -> tuple[Options | None, list[str]]:
    """The dry run's options, or None where none is asked for, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--images_per_second", type=float)
    parser.add_argument("--gib_per_rank", type=float)
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if not found.dry_run:
        for key in ("world_size", "images_per_second", "gib_per_rank"):
            if getattr(found, key) is not None:
                raise UserError(f"--{key} belongs to --dry_run; torchrun's --nproc_per_node sets the ranks of a run")
        return None, rest
    world_size = found.world_size if found.world_size is not None else int(os.environ.get("WORLD_SIZE", "1"))
    for key, value in (("world_size", world_size), ("images_per_second", found.images_per_second)):
        if value is not None and value <= 0:
            raise UserError(f"--{key}: {value} must be above 0")
    return Options(world_size, found.images_per_second, found.gib_per_rank), rest


def make_plan(config: Config, world_size: int) -> Plan:
    """The plan of the run that `config` describes, which has passed `check`.

    Reads the shard folders' indices, no picture and no weights. Raises `UserError` where the run could not go to its
    end: sizes that do not divide, splits that are too small or lack styles, more neighbours than exemplars.
    """
    check_ranks(config, world_size)
    folders = {"source": config.source, "target": config.target}
    domains = {name: ShardIndex.load(folder) for name, folder in folders.items() if folder}
    network = measure(config, domains, world_size)
    feeder = Feeder(config, meta_method(config, domains), training_splits(domains), CPU, world_size)
    num_exemplars = len(domains["target"].split("train")) if "target" in domains else 0
    element = 8 if config.precision == "fp64" else 4
    costs = load(config.method).costs(
        flatten(config), num_pictures=num_exemplars, world_size=world_size, element=element
    )
    alone_steps = feeder.timeline.source_only_steps
    own_flops = (feeder.timeline.total_steps - alone_steps) * (network.flops + costs.flops)
    batch = config.global_batch_size // world_size
    model = (network.parameters + network.trained_parameters) * element + network.buffer_bytes
    return Plan(
        world_size=world_size,
        timeline=feeder.timeline,
        batch_per_rank=batch,
        num_exemplars=num_exemplars,
        network=network,
        memory=_memory(config, network, batch, element) | dict(costs.memory),
        transfers=_transfers(config, network, element) + costs.transfers if world_size > 1 else (),
        checkpoint_bytes=model + costs.checkpoint_bytes,
        checkpoints=config.checkpoint.keep + config.checkpoint.keep_best + len(config.checkpoint.keep_epochs),
        flops_per_rank=own_flops + alone_steps * network.source_flops,
    )


def _is_accelerated(config: Config) -> bool:
    """Whether the ranks compute on accelerators; with device auto, where this host has one."""
    return config.device != "cpu" and (config.device != "auto" or torch.accelerator.is_available())


def _memory(config: Config, network: NetworkCost, batch: int, element: int) -> dict[str, int]:
    device = torch.device("cuda" if _is_accelerated(config) else "cpu")
    pixels = 3 * config.data.height * config.data.width
    # Under autocast nearly all that is kept for the backward pass is in half precision.
    activation = 2 if config.precision in ("bf16", "fp16") else element
    return {
        "parameters": network.parameters * element + network.buffer_bytes,
        "gradients": network.trained_parameters * element,
        "momentum of SGD": network.trained_parameters * element,
        "activations": network.activations * activation,
        "pictures": 2 * batch * pixels * (4 + 1),
        "chunk of memory rows": default_chunk_bytes(device),
    }


def _transfers(config: Config, network: NetworkCost, element: int) -> tuple[Transfer, ...]:
    transfers = [Transfer("gradients", "all_reduce", network.trained_parameters * element)]
    if config.model.batchnorm == "sync":
        # Mean and square sum of every channel, for each domain: there and, for the backward pass, back.
        statistics = 2 * 2 * sum(network.batchnorm_channels) * element
        transfers.append(Transfer("BatchNorm, forward", "all_gather", statistics))
        transfers.append(Transfer("BatchNorm, backward", "all_reduce", statistics))
    return tuple(transfers)


def seconds(plan: Plan, config: Config, options: Options) -> tuple[float, str]:
    """The run's training time, and what that rests on. Evaluation and checkpoints come on top."""
    total, source_only = plan.timeline.total_steps, plan.timeline.source_only_steps
    if options.images_per_second:
        images = (2 * total - source_only) * config.global_batch_size
        return images / options.images_per_second, f"at the {options.images_per_second:g} images/s that were given"
    accelerated = _is_accelerated(config)
    rate = ASSUMED_FLOPS[config.precision][accelerated]
    kind = "an accelerator" if accelerated else "the CPU"
    return (
        plan.flops_per_rank / rate,
        f"assuming that a rank sustains {rate / 1e12:g} TFLOP/s in {config.precision} on {kind}, data and network "
        "never slower; measure a few steps and give --images_per_second for a better one",
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
            f"a rank would need {plan.memory_bytes / GIB:.2f} GiB, and {where} gives {limit / GIB:.2f} GiB; the "
            f"largest part is {largest} ({plan.memory[largest] / GIB:.2f} GiB). Use more ranks, a smaller "
            "global_batch_size, precision bf16, or memory.dtype bf16"
        )
    needed = plan.checkpoint_bytes * (plan.checkpoints + 1)  # one more while the newest is being written
    free = free_bytes(Path(config.output_dir))
    if free < needed:
        raise UserError(
            f"output_dir: {config.output_dir} has {free / GIB:.2f} GiB free, and {plan.checkpoints + 1} checkpoints of "
            f"{plan.checkpoint_bytes / GIB:.2f} GiB need {needed / GIB:.2f}; make room, or lower checkpoint.keep"
        )


def free_bytes(folder: Path) -> int:
    """Free space on the file system of `folder`, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def describe(plan: Plan, config: Config, options: Options) -> str:
    """The plan as text."""
    timeline, world_size = plan.timeline, plan.world_size
    wanted, assumption = seconds(plan, config, options)
    lines = [
        ("ranks", f"{world_size}"),
        ("epochs", f"{timeline.source_only_epochs} on the source alone, then {timeline.epochs}"),
        ("steps", f"{timeline.steps_per_epoch} an epoch, {timeline.total_steps} in all"),
        ("batch", f"{plan.batch_per_rank} images of each domain on a rank, {config.global_batch_size} on all"),
        ("exemplars", f"{plan.num_exemplars}, {RowPartition(plan.num_exemplars, world_size).size(0)} on a rank"),
        (
            "parameters",
            f"{plan.network.parameters / 1e6:.2f} M, of which {plan.network.trained_parameters / 1e6:.2f} M train",
        ),
        ("memory", f"{_size(plan.memory_bytes)} a rank, beside what the driver takes:"),
        *(("", f"{_size(size):>12}  {name}") for name, size in plan.memory.items()),
        ("network", f"{_size(plan.sent_bytes)} sent by a rank in a step" + (":" if plan.transfers else "")),
        *(("", f"{_size(sent(t, world_size)):>12}  {t.what} ({t.operation})") for t in plan.transfers),
        ("checkpoint", f"{_size(plan.checkpoint_bytes)}, of which at most {plan.checkpoints} are kept"),
        ("time", f"{_duration(wanted)}, {assumption}"),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def run(config: Config, options: Options) -> None:
    """Print the plan of `config`, which has passed `check`. Raises `UserError` where it cannot be carried out."""
    plan = make_plan(config, options.world_size)
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        print(describe(plan, config, options), flush=True)
    check_fits(plan, config, options)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    return (f"{days} d " if days else "") + f"{hours} h {minutes % 60:02d} min"
