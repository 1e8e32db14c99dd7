"""Start and end of the process group, and who this process is in it."""

import ctypes
import logging
import os
import re
import signal
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from ecn_dist.distributed.liveness import EXIT_RANK_LOST, Heartbeats, exit_at_once, report, tell_torchrun
from ecn_dist.errors import UserError

DEFAULT_TIMEOUT_SECONDS = 300.0
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
_heartbeats: Heartbeats | None = None


def resolve_device(name: str = "auto") -> torch.device:
    """The device of this rank: `auto` (the accelerator if there is one, else the CPU), `cpu`, `cuda`, `cuda:1`, ...

    Raises `UserError` for what is no device name, and for an accelerator that is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is no device name; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        found = f"{name!r} was asked for, but torch {torch.__version__} sees no such accelerator on this host"
        raise UserError(f"device: {found}; check the driver and the torch build, or pass --device cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= (count := torch.accelerator.device_count()):
        needs = f"rank {rank()} needs {device.type}:{index}, but this host has {count}"
        raise UserError(f"device: {needs}; lower torchrun's --nproc_per_node")
    device = torch.device(device.type, index)
    torch.accelerator.set_device_index(index)
    return device


def keep_freed_memory() -> None:
    """Let the C library (glibc; others do nothing) give freed large blocks out again, without asking the kernel.

    On the CPU every feature map is such a block, and to have its pages mapped and cleared anew costs a step a quarter
    of its time, and an evaluation in large batches more than half (MobileNetV2). For the whole process, from now on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start(device: torch.device, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
    """Join the process group that torchrun's environment describes; without that environment, stay one process.

    The backend is gloo, and beside it an accelerator's own (nccl on CUDA). A collective that waits longer than the
    time-out fails, and a rank not heard of for so long ends the others. On the CPU freed memory is kept from then on.
    Raises `UserError` where the environment is not as torchrun makes it, or the ranks cannot be connected in time.
    """
    global _heartbeats
    if device.type == "cpu":
        keep_freed_memory()
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    _check_environment()
    on_cpu, timeout = device.type == "cpu", timedelta(seconds=timeout_seconds)
    backend = "gloo" if on_cpu else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives the ranks: after a restart they must not meet what those before them left.
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        group, device_id = dist.PrefixStore("group", store), None if on_cpu else device
        dist.init_process_group(backend, None, timeout, world_size, rank, group, device_id=device_id)
        if world_size > 1:
            own_connection = dist.PrefixStore("liveness", store).clone()  # type: ignore[attr-defined]  # not in its stubs
            _heartbeats = Heartbeats(own_connection, rank, world_size, timeout_seconds)
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        own_rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {own_rank} on host {socket.gethostname()} could not be connected at {address}:{port} "
            f"within {timeout_seconds:g} s ({_one_line(error)}). Start all ranks, look for another one's error, give "
            "every host the same address, open all TCP ports between the hosts, name the network device between them "
            "in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or raise timeout_seconds"
        ) from error


def _check_environment() -> None:
    remedy = "start the ranks by torchrun, or by a script of launch/"

    def whole_number(name: str, least: int, most: int, remark: str) -> int:
        value = os.environ.get(name) or ""
        if not value.isascii() or not value.isdecimal() or not least <= int(value) <= most:
            said = f"is {value!r}, and must be a whole number {remark}" if value else "is not set"
            raise UserError(f"the environment's {name} {said}; {remedy}")
        return int(value)

    world_size = whole_number("WORLD_SIZE", 1, 2**31, "from 1 on")
    whole_number("RANK", 0, world_size - 1, f"from 0 on, below WORLD_SIZE {world_size}")
    whole_number("MASTER_PORT", 0, 65535, "up to 65535")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"the environment's MASTER_ADDR is not set; {remedy}")


def end() -> None:
    """Leave the process group. Does nothing where there is none."""
    global _heartbeats
    if _heartbeats is not None:
        _heartbeats.stop()
        _heartbeats = None
    if dist.is_initialized():
        dist.destroy_process_group()


def report_failure(error: Exception) -> None:
    """Tell the log, torchrun, and the other ranks why this rank ends; the caller shows the error itself.

    Where another rank is lost, the error is explained, on the console by one rank, and this process ended: the broken
    group's threads would wait for that rank until the time-out.
    """
    log = logging.getLogger("ecn_dist")
    if _heartbeats is not None and _is_of_communication(error):
        log.debug("a collective failed", exc_info=error)
        # torchrun ends this process for the same reason, and is to wait for the explanation.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        explanation, speaks = _heartbeats.explain(_one_line(error))
        report(explanation, to_console=speaks)
        _heartbeats.stop()
        exit_at_once(EXIT_RANK_LOST)
    if _heartbeats is not None:
        _heartbeats.announce(_one_line(error))
    if log.handlers:
        log.error("rank %d ends by an error", rank(), exc_info=error, extra={"file_only": True})
    tell_torchrun(_one_line(error))


def _is_of_communication(error: Exception) -> bool:
    """gloo's errors are plain RuntimeErrors, told by their text; NCCL's and the store's have a class."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _one_line(error: Exception) -> str:
    text = re.sub(r"^\[\S*gloo\S*\] |\. This is typically caused.*", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}"


def is_distributed() -> bool:
    """Whether a process group is up. For reports and start-up only: mathematics need not ask."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and talks to the console."""
    return rank() == 0
