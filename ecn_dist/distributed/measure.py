"""How fast the ranks talk to each other, and whether their clocks agree.

W ranks.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ecn_dist.distributed.collectives import all_gather_rows, barrier
from ecn_dist.distributed.process_group import world_size

_LATENCY_ROUNDS = 30
_BANDWIDTH_ROUNDS = 5
_CLOCK_ROUNDS = 15


@dataclass(frozen=True)
class AllReduceSpeed:
    """Medians over a few rounds."""

    latency_seconds: float  # of an all-reduce of 8 bytes
    num_bytes: int  # of the large one
    seconds: float  # of the large one

    def bus_bandwidth(self, world_size: int) -> float:
        """Bytes a second that a ring moves through each rank's link: 2 (W - 1) / W of the tensor in each direction."""
        return 2 * (world_size - 1) / world_size * self.num_bytes / self.seconds


def measure_all_reduce(device: torch.device, *, most_bytes: int, most_seconds: float) -> AllReduceSpeed:
    """Time all-reduces on `device`. Collective; the same figures on every rank: rank 0's.

    The large one has `most_bytes`, or fewer where these would take longer than `most_seconds` in all.
    """
    latency = _median_seconds(torch.zeros(1, dtype=torch.float64, device=device), _LATENCY_ROUNDS)
    num_bytes = min(2**20, most_bytes)
    seconds = _median_seconds(torch.zeros(num_bytes // 4, device=device), 3)
    while num_bytes < most_bytes and 2 * seconds * (_BANDWIDTH_ROUNDS + 1) < most_seconds:
        num_bytes = min(2 * num_bytes, most_bytes)
        seconds = _median_seconds(torch.zeros(num_bytes // 4, device=device), _BANDWIDTH_ROUNDS)
        most_seconds -= seconds * (_BANDWIDTH_ROUNDS + 1)
    return AllReduceSpeed(latency, num_bytes, seconds)


def _median_seconds(tensor: torch.Tensor, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first round makes connections
        barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    median = torch.tensor([statistics.median(times[1:])], dtype=torch.float64)
    dist.broadcast(median, src=0)  # all ranks decide by the same figure
    return median.item()


def measure_clocks() -> list[float]:
    """Every rank's clock against rank 0's, in seconds, on all ranks. Collective.

    Every round all ranks read their clocks just after a barrier. How unevenly they leave it, mostly much less than
    10 ms, is the error; the median over rounds takes the outliers away.
    """
    offsets = []
    for _ in range(_CLOCK_ROUNDS):
        barrier()
        clocks_W = all_gather_rows(torch.tensor([time.time()], dtype=torch.float64))
        offsets.append(clocks_W - clocks_W[0])
    return torch.stack(offsets).median(dim=0).values.tolist() if world_size() > 1 else [0.0]
