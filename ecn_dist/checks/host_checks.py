"""What `doctor` looks at on one host, before any rank waits for another."""

import os
import platform
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ecn_dist import distributed
from ecn_dist.checks.dry_run import free_bytes
from ecn_dist.config import Config
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.index import is_url
from ecn_dist.data.jpeg import UnreadablePicture, decode
from ecn_dist.data.loader import SHARED_MEMORY, stream_shared_memory
from ecn_dist.errors import UserError

MIB, GIB = 2**20, 2**30
OLDEST_TORCH = (2, 11)
NCCL_SHM_BYTES = 64 * MIB  # of a rank, for its channels to the host's other ranks
LEAST_FREE_BYTES = GIB
CONNECT_SECONDS = 10.0
GLOO_DEVICES, NCCL_DEVICES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
LOOPBACK = "lo"


def launched(name: str, default: int) -> int:
    """What torchrun's environment says before the process group is up, such as `launched("WORLD_SIZE", 1)`."""
    return int(os.environ.get(name, default))


def several_hosts() -> bool:
    """Whether torchrun started ranks on other hosts too."""
    return launched("WORLD_SIZE", 1) > launched("LOCAL_WORLD_SIZE", launched("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Finding:
    """What a check found; where it is not well, what to do."""

    check: str
    text: str
    remedy: str = ""  # empty: all is well

    @property
    def ok(self) -> bool:
        return not self.remedy


def check_torch() -> Iterable[Finding]:
    """Python, torch and NCCL."""
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        parts += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    remedy = "" if version >= OLDEST_TORCH else f"install torch {'.'.join(map(str, OLDEST_TORCH))} or newer"
    yield Finding("torch", ", ".join(parts), remedy)


def check_accelerator(config: Config) -> Iterable[Finding]:
    """The device of this rank: there, one for each rank of the host, and working."""
    built_for = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else None
    if config.device == "cpu" or (
        config.device == "auto" and built_for is None and not torch.accelerator.is_available()
    ):
        yield Finding(
            "accelerator", "ranks compute on the CPU" + ("" if built_for else ", as this torch is built for it")
        )
        return
    if not torch.accelerator.is_available():
        yield Finding(
            "accelerator",
            f"torch is built for {built_for or 'the CPU'} and sees no accelerator",
            "look at nvidia-smi (rocm-smi) on the host; give a container its GPUs (docker run --gpus all), and a SLURM "
            "job (--gpus-per-node N); or compute on the CPU with --device cpu",
        )
        return
    count, ranks = torch.accelerator.device_count(), launched("LOCAL_WORLD_SIZE", 1)
    if ranks > count:
        yield Finding(
            "accelerator",
            f"{ranks} ranks on this host and {count} accelerators",
            f"start {count} ranks here (--nproc_per_node {count}), or give the job more accelerators",
        )
        return
    device = distributed.resolve_device(config.device)
    free, total = torch.accelerator.get_memory_info(device)
    ones = torch.ones(64, 64, device=device)
    works = bool(((ones @ ones) == 64).all())
    text = f"{device}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not works:
        yield Finding("accelerator", f"{text}; a matrix product is wrong", "take this device out of service")
    elif free < total / 2:
        yield Finding("accelerator", text, "end the other programs on it (nvidia-smi lists them), or choose another")
    else:
        yield Finding("accelerator", text)


def needed_shared_memory(config: Config) -> int:
    """Bytes of /dev/shm that the ranks of this host need: the loaders' batches, both domains, and NCCL's channels."""
    ranks = launched("LOCAL_WORLD_SIZE", 0) or max(torch.accelerator.device_count(), 1)
    world_size = max(launched("WORLD_SIZE", 1), ranks)
    picture = config.data.height * config.data.width * 3
    batch = -(-config.global_batch_size // world_size) * picture
    nccl = NCCL_SHM_BYTES if config.device != "cpu" and torch.accelerator.is_available() else 0
    return ranks * (2 * stream_shared_memory(batch, config.data.workers) + nccl)


def check_shm(config: Config) -> Iterable[Finding]:
    """Shared memory: containers get 64 MiB where nobody asks for more."""
    if not Path(SHARED_MEMORY).is_dir():
        yield Finding("shm", f"there is no {SHARED_MEMORY} here")
        return
    free, needed = free_bytes(Path(SHARED_MEMORY)), needed_shared_memory(config)
    text = f"{SHARED_MEMORY} has {free / MIB:.0f} MiB free, {needed / MIB:.0f} MiB are needed"
    remedy = (
        "give the container more (docker run --shm-size=8g, or --ipc=host; Kubernetes: an emptyDir of medium Memory), "
        "or lower data.workers"
    )
    yield Finding("shm", text, "" if free >= needed else remedy)


def check_host() -> Iterable[Finding]:
    """This host's own name: gloo listens where it leads to, and tells the other ranks that address."""
    name, hosts = socket.gethostname(), several_hosts()
    wrong = list(_wrong_devices(name, [device for _, device in socket.if_nameindex()], hosts))
    if wrong:
        yield from wrong
        return
    # NCCL's variable does not help here: on GPUs too, gloo connects the ranks for their CPU tensors.
    interface = os.environ.get(GLOO_DEVICES)
    remedy = (
        f"give {name} its own address in /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME to the network device between "
        "the hosts (ip address lists them); else ranks on other hosts cannot reach this one"
    )
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding("host", f"the name {name} leads nowhere ({error})", remedy if hosts and not interface else "")
        return
    loopback = address.startswith("127.")
    text = f"{name} is {address}" + (f", device {interface}" if interface else "")
    yield Finding("host", text, remedy if hosts and loopback and not interface else "")


def nccl_devices(value: str, there: list[str]) -> list[str]:
    """The network devices of `there` that NCCL takes for NCCL_SOCKET_IFNAME=`value`.

    A comma list of prefixes, or with = before it of whole names; ^ before all turns it round. A :port is ignored
    (matchIfList in NCCL's src/misc/utils.cc; an empty list fits all).
    """
    names = value.removeprefix("^")
    exact, names = names.startswith("="), names.removeprefix("=")
    wanted = [name for name in (part.partition(":")[0] for part in names.split(",")) if name]

    def fits(device: str) -> bool:
        return not wanted or any(device == name if exact else device.startswith(name) for name in wanted)

    return [device for device in there if fits(device) != value.startswith("^")]


def _wrong_devices(host: str, there: list[str], hosts: bool) -> Iterable[Finding]:
    """The variables that name network devices, where no rank of another host could be reached by what they name."""
    usable = ", ".join(device for device in there if device != LOOPBACK or not hosts)
    gloo, nccl = os.environ.get(GLOO_DEVICES), os.environ.get(NCCL_DEVICES)
    if gloo:  # whole names, and every one of them is opened
        remedy = f"set {GLOO_DEVICES} to the whole name of a device, or several with commas; it has: {usable}"
        absent = [device for device in gloo.split(",") if device not in there]
        if absent:
            yield Finding("host", f"{host} has no network device {', '.join(absent)} ({GLOO_DEVICES}={gloo})", remedy)
        elif hosts and LOOPBACK in gloo.split(","):
            yield Finding("host", f"{GLOO_DEVICES}={gloo} does not lead from {host} to the other hosts", remedy)
    if nccl:
        remedy = (
            f"set {NCCL_DEVICES} to the beginning of a device's name (=NAME for the whole name, ^NAME for all but "
            f"these, or several with commas); {host} has: {usable}"
        )
        chosen = nccl_devices(nccl, there)
        if not chosen:
            yield Finding("host", f"{host} has no network device that fits {NCCL_DEVICES}={nccl}", remedy)
        elif hosts and LOOPBACK in chosen:
            fits = f"{NCCL_DEVICES}={nccl} fits {LOOPBACK} on {host}, which does not lead to the other hosts"
            yield Finding("host", fits, remedy)


def check_rendezvous() -> Iterable[Finding]:
    """The name and port where ranks meet, MASTER_ADDR and MASTER_PORT: to be reached, or, on that host, to be had."""
    name, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    if not name:
        yield Finding("rendezvous", "MASTER_ADDR is not set: one host alone")
        return
    where = f"{name}:{port}"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding(
            "rendezvous",
            f"the name {name} leads nowhere on {socket.gethostname()} ({error})",
            "set MASTER_ADDR to a name or address of the first host that all hosts know",
        )
        return
    if several_hosts() and address.startswith("127.") and "localhost" not in name:
        yield Finding(
            "rendezvous",
            f"{name} is {address} on {socket.gethostname()}, which is every host's own address",
            f"correct {name} in /etc/hosts, or set MASTER_ADDR to its address on the network",
        )
        return
    try:
        socket.create_connection((address, int(port)), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        # Before a run nobody listens yet, and the refusal shows that the host is there. In a run somebody must.
        in_run = "RANK" in os.environ
        remedy = "see whether the launcher on that host has ended; its output says why" if in_run else ""
        yield Finding(
            "rendezvous", f"{where}: the host is there, and nobody listens" + ("" if in_run else " yet"), remedy
        )
    except OSError as error:
        yield Finding(
            "rendezvous",
            f"{where} ({address}) cannot be reached from {socket.gethostname()} ({error})",
            "look for a firewall between the hosts, a wrong MASTER_ADDR, or a host that is down; ranks need all TCP "
            "ports between the hosts",
        )
    else:
        own = _is_own(address) and "RANK" not in os.environ
        remedy = f"port {port} is taken on this host; choose another MASTER_PORT" if own else ""
        yield Finding("rendezvous", f"{where} answers", remedy)


def check_disk(config: Config, needed: int | None) -> Iterable[Finding]:
    """The run folder can be written, and has room for `needed` bytes of checkpoints."""
    if not config.output_dir:
        yield Finding("disk", "no output_dir was given, so none is looked at")
        return
    folder = Path(config.output_dir).absolute()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "disk",
            f"output_dir: {existing} cannot be written by user {os.getuid()}",
            "name another folder, or correct its owner (for a container, of the mounted volume)",
        )
        return
    free, wanted = free_bytes(folder), needed or LEAST_FREE_BYTES
    what = "the checkpoints need" if needed else "a run needs at least"
    remedy = "make room, name another output_dir, or lower checkpoint.keep" if free < wanted else ""
    yield Finding("disk", f"output_dir has {free / GIB:.1f} GiB free, {what} {wanted / GIB:.2f}", remedy)


def check_shards(config: Config) -> Iterable[Finding]:
    """The shard folders: index, every shard's size, and one picture of every split read and decoded."""
    for key in ("source", "target"):
        folder = getattr(config, key)
        if not folder:
            yield Finding("shards", f"no {key} was given, so none is looked at")
            continue
        try:
            index = ShardIndex.load(folder)
        except UserError as error:
            yield Finding("shards", f"{key}: {error}", f"give this host the folder of --{key}, at the same path as all")
            continue
        problems = [problem for split in index.splits.values() for problem in _shard_problems(split)]
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            yield Finding(
                "shards", f"{key}: {problems[0]}{more}", f"copy {folder} again; ecn-dist validate {folder} tells all"
            )
        else:
            pictures = sum(len(split) for split in index.splits.values())
            yield Finding("shards", f"{key}: {pictures} pictures in {folder} can be read")


def _shard_problems(split: SplitIndex) -> Iterable[str]:
    if is_url(split.folder):
        return
    for at, shard in enumerate(split.shards):
        path = Path(split.shard_path(at))
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != shard.bytes:
            yield f"{path} has {path.stat().st_size} bytes, and was packed with {shard.bytes}"
    row = split.members[-1]
    path, slot = Path(split.shard_path(int(row["shard"]))), split.num_cameras
    try:
        with path.open("rb") as file:
            file.seek(int(row["offset"][slot]))
            decode(file.read(int(row["length"][slot])))
    except (OSError, UnreadablePicture) as error:
        yield f"a picture of {path} cannot be read ({error})"


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of `run`; an error that it did not expect is a finding too, so that no rank leaves the others."""
    try:
        return list(run())
    except (UserError, OSError, RuntimeError, ValueError) as error:
        return [Finding(check, f"the check failed: {error}", "see the message; it names what is missing")]


def _is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
