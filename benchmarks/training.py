"""The whole step of training beside the bare network: pictures a second of `train`, and of what it cannot do without.

The trainer runs as it ships: shards are read, decoded and augmented by its workers, losses, memory and log are its own.
The bare side is the same network (heads, frozen stages and BatchNorm included) in a plain loop: forward, backward and
the step of torch's optimiser on batches of this very run that are held in memory; on several ranks under torch's
DistributedDataParallel. Both take the same number of steps, in turn: an epoch of the trainer, then the bare loop.

Wall time is that of the slowest rank. Processor time is of the ranks' own processes, without the loader's workers: on a
machine that others use, its ratio is the one to trust.
"""

import argparse
import copy
import inspect
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from benchmarks.data import write_loose_files
from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.data import Batch
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Step
from ecn_dist.packing.layouts import read_dataset
from ecn_dist.packing.shards import pack
from ecn_dist.packing.styles import find_styles
from ecn_dist.training import building
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.trainer import Trainer

CAMERAS = 6
# Nothing is sent in a forward pass, as in `train`. Torch 2.13 renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
Seconds = dict[str, list[tuple[float, float]]]  # by side: wall and processor time of each round


class Bare:
    """The trainer's network in a plain loop."""

    def __init__(self, trainer: Trainer, config: Config) -> None:
        """Remembers the batches of the trainer's first epoch from here on."""
        self.device, self.precision = trainer.method.setting.device, config.precision
        self.method = copy.deepcopy(trainer.method)
        self.network: torch.nn.Module = self.method
        if distributed.world_size() > 1:
            ids = [self.device] if self.device.type != "cpu" else None
            self.network = DistributedDataParallel(self.method, ids, gradient_as_bucket_view=True, **NO_BUFFERS)
        optim = config.optim
        groups = self.method.parameter_groups(lr=1e-6, backbone_lr=1e-6)  # it stays where no loss is not finite
        self.optimizer = torch.optim.SGD(groups, momentum=optim.momentum, weight_decay=0.0, nesterov=True)
        self.batches: list[tuple[dict[str, Tensor], Step]] = []
        self._next, self._steps = trainer.feeder.next, trainer.timeline.steps_per_epoch
        trainer.feeder.next = self._remember  # type: ignore[method-assign]

    def _remember(self, at: Step) -> tuple[dict[str, Batch], float]:
        batches, waited = self._next(at)
        if len(self.batches) < self._steps:
            self.batches.append(({name: batch.images for name, batch in batches.items()}, at))
        return batches, waited

    def run(self) -> None:
        """As many steps as an epoch of the trainer has."""
        self.network.train()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        for images, at in self.batches:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                outputs = self.network(images, at)
            torch.stack([output.float().square().mean() for output in outputs.values()]).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def measure(config: Config, device: torch.device, folder: Path, rounds: int) -> dict[str, Any]:
    """One line of the table. Collective."""
    trainer = building.build_trainer(config, building.open_domains(config), device, folder)
    bare = Bare(trainer, config)
    seconds: Seconds = {"train": [], "bare": []}
    started = (0.0, 0.0)

    def now() -> tuple[float, float]:
        harness.synchronize(device)
        return time.perf_counter(), time.process_time()

    def note(side: str) -> None:
        nonlocal started
        spent = torch.tensor([after - before for after, before in zip(now(), started, strict=True)])
        seconds[side].append(tuple(distributed.all_reduce(spent, "max").tolist()))
        distributed.barrier()
        started = now()

    begin_epoch = trainer.feeder.begin_epoch

    def after_epoch(at: Step) -> None:
        """Before the next one begins; the last has none after it, and is not timed."""
        if at.number:
            note("train")
            bare.run()
            note("bare")
            trainer.method.train()
        begin_epoch(at)

    trainer.feeder.begin_epoch = after_epoch  # type: ignore[method-assign]
    started = now()
    trainer.fit(StopRequest())
    timed = {side: values[-rounds:] for side, values in seconds.items()}
    pictures = trainer.timeline.steps_per_epoch * trainer.feeder.images(trainer.timeline.at(0))
    wall, processor = ({side: [value[at] for value in values] for side, values in timed.items()} for at in (0, 1))
    ratios = sorted(bare / train for train, bare in zip(wall["train"], wall["bare"], strict=True))
    return {
        "network": config.model.arch,
        "input": f"{config.data.height}x{config.data.width}",
        "method": config.method,
        "batch": config.global_batch_size,
        "ranks": distributed.world_size(),
        "workers": config.data.workers,
        "train pictures/s": pictures / statistics.median(wall["train"]),
        "bare pictures/s": pictures / statistics.median(wall["bare"]),
        "train / bare": statistics.median(ratios),
        "from": ratios[0],
        "to": ratios[-1],
        "by processor time": harness.median_ratio(processor["bare"], processor["train"]),
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = ["mobilenet_v2:128x64", "resnet50:256x128"]
    parser.add_argument("--networks", nargs="+", default=cases, metavar="ARCH:HxW", help="(%(default)s)")
    parser.add_argument("--method", default="ecn", help="of `train` (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="global, of each domain (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a round (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes a rank and domain (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="a rank, on the CPU (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="W", help="start so many ranks here, one count a time")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="more options of `train`")
    harness.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every network; print the table and, with --output, write it."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.ranks and "RANK" not in os.environ:  # ranks that torchrun started get the option too
        for world_size in options.ranks:
            harness.start_ranks("training", world_size, arguments, options.threads)
        return 0
    torch.set_num_threads(options.threads)
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.on_main(lambda: own))
        distributed.on_main(lambda: write_shards(folder, options.batch_size * options.steps))
        rows = [
            measure(config_of(case, options, folder), device, folder / case, options.rounds)
            for case in options.networks
        ]
        distributed.barrier()
    if distributed.is_main():
        world_size = distributed.world_size()
        name = "training" if world_size == 1 else f"training-{world_size}-ranks"
        harness.report(options, name, harness.machine(device), rows, harness.markdown_table(rows))
    return 0


def write_shards(folder: Path, pictures: int) -> None:
    """Drawn pictures with style copies, which serve as source and as target."""
    write_loose_files(folder / "loose", pictures, CAMERAS)
    dataset = read_dataset("market", folder / "loose")
    pack(dataset, folder / "shards", find_styles(dataset, "shipped"), workers=1)


def config_of(case: str, options: argparse.Namespace, folder: Path) -> Config:
    """A run of two rounds more than those timed, the first and the last, without what `train` does between epochs."""
    arch, _, size = case.rpartition(":")
    height, _, width = size.partition("x")
    if not (arch and height.isdecimal() and width.isdecimal()):
        raise UserError(f"--networks: {case!r} is no ARCH:HEIGHTxWIDTH, such as resnet50:256x128")
    given = {
        "method": options.method,
        "source": folder / "shards",
        "target": folder / "shards",
        "output_dir": folder / case,
        "epochs": options.rounds + 2,
        "global_batch_size": options.batch_size,
        "data.streams": options.batch_size,
        "data.height": height,
        "data.width": width,
        "data.workers": options.workers,
        "model.arch": arch,
        "model.weights": "none",
        "optim.lr": 1e-6,
        "optim.backbone_lr": 1e-6,
        "checkpoint.every_steps": 10**9,
    } | dict(option.partition("=")[::2] for option in options.options)
    argv = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    config = configuration.parse(argv, "benchmarks training", "")
    config.check()
    return config
