"""What `doctor` looks at on one host, before any rank waits for another."""

import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.data import ShardIndex
from ecn_dist.data.index import is_url
from ecn_dist.data.loader import SHARED_MEMORY, check_shared_memory
from ecn_dist.data.reader import ShardReader, check_shards
from ecn_dist.errors import UserError
from ecn_dist.models import weights_file

MIB, GIB = 2**20, 2**30
OLDEST_TORCH = (2, 11)
NCCL_SHM_BYTES = 64 * MIB  # of a rank, for its channels to the host's other ranks
LEAST_FREE_BYTES = GIB


def launched(name: str, default: int) -> int:
    """What torchrun's environment says before the process group is up, such as `launched("WORLD_SIZE", 1)`."""
    value, least = os.environ.get(name, str(default)), min(1, default)
    if not value.isdecimal() or int(value) < least:
        raise UserError(
            f"{name} is {value!r}, and no whole number from {least} on; torchrun sets it: start with torchrun"
        )
    return int(value)


def free_bytes(folder: Path) -> int:
    """Free space on the file system of `folder`, which need not exist yet."""
    return shutil.disk_usage(existing_part(folder)).free


def existing_part(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def writable_part(folder: Path) -> Path:
    """`existing_part` of a run folder. `UserError` where it is none, or may not be written."""
    place = existing_part(folder)
    if not place.is_dir():
        raise UserError(f"output_dir: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir: {place} cannot be written by user {os.getuid()}; name another, or correct its owner"
        )
    return place


@dataclass(frozen=True)
class Finding:
    """What a check found; where it is not well, what to do."""

    check: str
    text: str
    remedy: str = ""  # empty: all is well

    @property
    def ok(self) -> bool:
        return not self.remedy


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of `run`; an error that it did not expect is a finding too, so that no rank leaves the others."""
    try:
        return list(run())
    except (UserError, OSError, RuntimeError, ValueError) as error:
        return [Finding(check, f"the check failed: {error}", "see the message; it names what is missing")]


def check_torch() -> Iterable[Finding]:
    """Python, torch and NCCL."""
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        parts += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    remedy = "" if version >= OLDEST_TORCH else f"install torch {'.'.join(map(str, OLDEST_TORCH))} or newer"
    return [Finding("torch", ", ".join(parts), remedy)]


def check_accelerator(config: Config) -> Iterable[Finding]:
    """The device of this rank: there, one for each rank of the host, and working."""
    built_for = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else None
    available = torch.accelerator.is_available()
    if config.device == "cpu" or (config.device == "auto" and not (built_for or available)):
        why = "" if built_for else ", as this torch is built for it"
        return [Finding("accelerator", f"ranks compute on the CPU{why}")]
    if not available:
        text = f"torch is built for {built_for or 'the CPU'} and sees no accelerator"
        remedy = (
            "look at nvidia-smi (rocm-smi) on the host; give a container its GPUs (docker run --gpus all), and a SLURM "
            "job (--gpus-per-node N); or compute on the CPU with --device cpu"
        )
        return [Finding("accelerator", text, remedy)]
    count, ranks = torch.accelerator.device_count(), launched("LOCAL_WORLD_SIZE", 1)
    if ranks > count:
        remedy = f"start {count} ranks here (--nproc_per_node {count}), or give the job more accelerators"
        return [Finding("accelerator", f"{ranks} ranks on this host and {count} accelerators", remedy)]
    device = distributed.resolve_device(config.device)
    free, total = torch.accelerator.get_memory_info(device)
    ones = torch.ones(64, 64, device=device)
    text, remedy = f"{device}: {free / GIB:.1f} of {total / GIB:.1f} GiB free", ""
    if not ((ones @ ones) == 64).all():
        text, remedy = f"{text}; a matrix product is wrong", "take this device out of service"
    elif free < total / 2:
        remedy = "end the other programs on it (nvidia-smi lists them), or choose another"
    return [Finding("accelerator", text, remedy)]


def check_shm(config: Config) -> Iterable[Finding]:
    """Shared memory for the loaders of both domains and NCCL's channels: a container gets 64 MiB if nobody asks."""
    if not Path(SHARED_MEMORY).is_dir():
        return [Finding("shm", f"there is no {SHARED_MEMORY} here")]
    ranks = launched("LOCAL_WORLD_SIZE", 0) or max(torch.accelerator.device_count(), 1)
    batch = -(-config.global_batch_size // max(launched("WORLD_SIZE", 1), ranks))
    remedy = "give the container more (docker run --shm-size=8g or --ipc=host; Kubernetes: emptyDir of medium Memory)"
    free, uses_nccl = free_bytes(Path(SHARED_MEMORY)), config.device != "cpu" and torch.accelerator.is_available()
    text = f"{SHARED_MEMORY} has {free // MIB} MiB free"
    if free < (nccl := ranks * NCCL_SHM_BYTES * uses_nccl):
        return [Finding("shm", f"{text}, and NCCL needs {nccl // MIB} MiB", remedy)]
    try:
        check_shared_memory(ranks * 2 * batch * 3 * config.data.height * config.data.width, config.data.workers)
    except UserError as error:
        return [Finding("shm", str(error), f"{remedy}, or lower data.workers")]
    return [Finding("shm", f"{text}, which is enough")]


def check_disk(config: Config, needed: int | None) -> Iterable[Finding]:
    """The run folder can be written, and has room for `needed` bytes of checkpoints."""
    if not config.output_dir:
        return [Finding("disk", "no output_dir was given, so none is looked at")]
    try:
        folder = writable_part(Path(config.output_dir))
    except UserError as error:
        remedy = "name another folder, or correct its owner (for a container, of the mounted volume)"
        return [Finding("disk", str(error), remedy)]
    free, wanted = free_bytes(folder), needed or LEAST_FREE_BYTES
    what = "the checkpoints need" if needed else "a run needs at least"
    remedy = "make room, name another output_dir, or lower checkpoint.keep" if free < wanted else ""
    return [Finding("disk", f"output_dir has {free / GIB:.1f} GiB free, {what} {wanted / GIB:.2f}", remedy)]


def check_weights(config: Config) -> Iterable[Finding]:
    """The file of starting weights is here."""
    if config.model.weights == "none":
        return [Finding("weights", "none are asked for")]
    try:
        return [Finding("weights", f"{weights_file(config.model.weights, config.model.arch)} is there")]
    except UserError as error:
        return [Finding("weights", str(error), "give every host the file at the same path, or set model.weights")]


def check_data(config: Config) -> Iterable[Finding]:
    """The shard folders: index, every local shard's size, and one picture of every local split read and decoded."""
    folders = {"source": config.source, "target": config.target}
    if config.checkpoint.validation:
        folders["checkpoint.validation"] = config.checkpoint.validation
    for key, folder in folders.items():
        if not folder:
            yield Finding("shards", f"no {key} was given, so none is looked at")
            continue
        remedy = f"give this host the folder of --{key}, at the same path as all, or copy it again; ecn-dist validate"
        try:
            splits = ShardIndex.load(folder).splits.values()
            check_shards(*splits)
            for split in splits:
                if not is_url(folder):
                    ShardReader().read_picture(split, len(split) - 1)
        except UserError as error:
            yield Finding("shards", f"{key}: {error}", f"{remedy} {folder} tells all")
        else:
            yield Finding("shards", f"{key}: {sum(map(len, splits))} pictures in {folder} can be read")
