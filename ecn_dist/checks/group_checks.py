"""What `doctor` looks at between the W ranks it was started on. Collective throughout; findings are on every rank."""

import secrets
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ecn_dist import distributed
from ecn_dist.checks.host_checks import MIB, Finding, existing_part
from ecn_dist.config import Config
from ecn_dist.errors import UserError
from ecn_dist.training.run import Run

SHARED_FOLDER_SECONDS = 5.0  # for a network file system to show what another host wrote
BANDWIDTH_SECONDS = 6.0
LARGEST_BYTES, LARGEST_BYTES_CPU = 256 * MIB, 32 * MIB
LATENCY_ROUNDS, BANDWIDTH_ROUNDS = 30, 5


def join(config: Config, device: torch.device) -> Finding:
    """Join the process group. Where that fails the finding has the remedy, and nothing else here may be called."""
    try:
        distributed.start(device, config.timeout_seconds)
    except (RuntimeError, UserError) as error:
        return Finding(
            "group",
            f"the ranks could not be connected in {config.timeout_seconds:g} s: {str(error).splitlines()[0]}",
            "see that MASTER_ADDR is a name or address of the first host that all hosts know, and no host's own name "
            "leads to 127.0.0.1 (/etc/hosts); name the network device between the hosts in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO shows what NCCL chose); open all TCP ports between the hosts",
        )
    backend = "nccl and gloo" if device.type == "cuda" else "gloo"
    return Finding("group", f"{distributed.world_size()} ranks are connected ({backend})")


def check_versions(own: str) -> Iterable[Finding]:
    """`own` describes this rank's software: it must be the same on all ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, version in enumerate(distributed.gather_objects(own)):
        ranks.setdefault(version, []).append(rank)
    if len(ranks) == 1:
        return [Finding("versions", "the same on all ranks")]
    text = "; ".join(f"ranks {', '.join(map(str, at))}: {version}" for version, at in ranks.items())
    remedy = "install the same versions on every host (requirements.txt, or one container image)"
    return [Finding("versions", text, remedy)]


def check_options(config: Config, data: dict[str, str]) -> Iterable[Finding]:
    """The options, and the fingerprints of the `data` that can be read here, are those of rank 0."""
    try:
        Run(config, data).check_alike()
    except UserError as error:
        return [
            Finding("options", str(error), "start all ranks by one command, with data at one path that hosts share")
        ]
    return [Finding("options", "the same on all ranks")]


def check_shared_folder(config: Config) -> Iterable[Finding]:
    """A file that rank 0 writes into the run folder's place is seen by all ranks, each in its own output_dir."""
    if distributed.any_rank(not config.output_dir):
        return []
    folder = existing_part(Path(config.output_dir))
    probe = folder / distributed.broadcast_object(f".doctor-{secrets.token_hex(8)}")
    try:
        distributed.together(lambda: probe.touch() if distributed.is_main() else None)
    except UserError as error:
        text = f"rank 0 cannot write into {probe.parent} ({error})"
        return [Finding("shared", text, "name a folder that can be written; see the finding on disk")]
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [str(rank) for rank, sees in enumerate(distributed.gather_objects(seen)) if not sees]
    if distributed.is_main():
        probe.unlink()
    if not blind:
        return [Finding("shared", f"all ranks see the same {probe.parent}")]
    written = distributed.broadcast_object(str(probe.parent))
    text = f"ranks {', '.join(blind)} do not see in their output_dir what rank 0 writes into {written}"
    remedy = "name an output_dir on a file system that all hosts share (in containers: the same volume)"
    return [Finding("shared", text, remedy)]


def check_all_reduce(
    device: torch.device, gradient_bytes: int | None, *, least_bandwidth: float, most_latency: float
) -> Iterable[Finding]:
    """Latency and bandwidth of the collective that carries the gradients, against limits in bytes/s and seconds.

    Bandwidth is what a ring moves through each rank's link, 2 (W - 1) / W of the tensor in each direction. The tensor
    has `LARGEST_BYTES`, or fewer where these would take longer than `BANDWIDTH_SECONDS` in all.
    """
    latency = _seconds(device, 8, LATENCY_ROUNDS)
    most_bytes, left = LARGEST_BYTES_CPU if device.type == "cpu" else LARGEST_BYTES, BANDWIDTH_SECONDS
    num_bytes, seconds = MIB, _seconds(device, MIB, 3)
    while num_bytes < most_bytes and 2 * seconds * (BANDWIDTH_ROUNDS + 1) < left:
        num_bytes *= 2
        seconds = _seconds(device, num_bytes, BANDWIDTH_ROUNDS)
        left -= seconds * (BANDWIDTH_ROUNDS + 1)
    bandwidth = 2 * (1 - 1 / distributed.world_size()) * num_bytes / seconds
    took = f"{num_bytes / MIB:.0f} MiB in {1000 * seconds:.1f} ms"
    text = f"latency {1000 * latency:.2f} ms, bandwidth {bandwidth / 1e6:.0f} MB/s ({took})"
    if gradient_bytes:
        text += f"; this run's gradients take about {seconds * gradient_bytes / num_bytes:.3f} s a step"
    remedies = []
    if bandwidth < least_bandwidth:
        remedies.append(
            f"below {least_bandwidth / 1e6:g} MB/s: name the fastest network device in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, see that NCCL finds InfiniBand (NCCL_DEBUG=INFO), and that no other job fills the "
            "link; --min_bandwidth sets the limit"
        )
    if latency > most_latency:
        remedies.append(
            f"above {1000 * most_latency:g} ms: use hosts nearer to each other, and see that no core has more ranks "
            "than it can run (OMP_NUM_THREADS, cores of the job); --max_latency sets the limit"
        )
    return [Finding("all_reduce", text, "; ".join(remedies))]


def _seconds(device: torch.device, num_bytes: int, rounds: int) -> float:
    """Median seconds of an all-reduce of so many bytes, as rank 0 has it, so that all ranks decide alike."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    times = []
    for _ in range(rounds + 1):  # the first round makes connections
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(tensor)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return distributed.broadcast_object(statistics.median(times[1:]))


def collect(own: list[Finding]) -> list[tuple[Finding, list[int]]]:
    """All ranks' findings, equal ones together with the ranks that found them, in the order of the checks."""
    together: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(distributed.gather_objects(own)):
        for finding in findings:
            together.setdefault(finding, []).append(rank)
    order = {check: at for at, check in enumerate(dict.fromkeys(finding.check for finding in own))}
    return sorted(together.items(), key=lambda item: order.get(item[0].check, len(order)))
