"""Time and memory of `find_clusters`, beside the bare product of all features with all, and beside the dense version.

The yardstick is what nothing exact can do without: the float32 product N x N, in blocks, into one buffer. The dense
version is the usual one: distance matrix, sorted; code matrix; Jaccard matrix; scikit-learn's DBSCAN on it.

Run it under torchrun for more ranks: the features are whole on each, the work is divided.

Letters: N pictures, D feature length.
"""

import argparse
import ctypes
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from ecn_dist import distributed
from ecn_dist.clustering import find_clusters
from ecn_dist.command import command
from ecn_dist.ranking.distances import full_precision

BLOCK = 2048  # rows and, twice, columns of the bare product
PICTURES_OF_A_PERSON = 31  # as in MSMT17's training set
CAMERAS = 15


def make_features(num_pictures: int, dim: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N, D) unit features around one centre a person, shifted by the camera, and camids (N,)."""
    generator = torch.Generator().manual_seed(seed)
    people = torch.arange(num_pictures) // PICTURES_OF_A_PERSON
    people = people[torch.randperm(num_pictures, generator=generator)]
    camids = torch.randint(0, CAMERAS, (num_pictures,), generator=generator)
    centres = torch.randn(int(people.max()) + 1, dim, generator=generator)
    shifts = 0.5 * torch.randn(CAMERAS, dim, generator=generator)
    features = torch.empty(num_pictures, dim)
    for part in torch.arange(num_pictures).split(4096):
        drawn = noise * torch.randn(len(part), dim, generator=generator)
        features[part] = torch.nn.functional.normalize(drawn + centres[people[part]] + shifts[camids[part]])
    return features, camids


def bare_product(features: Tensor) -> None:
    """This rank's share of the rows times all, in blocks, into one buffer; nothing is done with it."""
    partition = distributed.RowPartition(len(features), distributed.world_size())
    rows = features[partition.start(distributed.rank()) : partition.stop(distributed.rank())]
    buffer = torch.empty(2 * BLOCK * BLOCK, dtype=features.dtype, device=features.device)
    with full_precision(features.device):
        for right in features.split(2 * BLOCK):
            for left in rows.split(BLOCK):
                size = len(left), len(right)
                torch.mm(left, right.T, out=buffer[: size[0] * size[1]].view(size))


def dense_clusters(features: Tensor, k1: int = 30, k2: int = 6, eps: float = 0.6, min_samples: int = 4) -> np.ndarray:
    """As the usual tools do it: N x N matrices in float32, one picture at a time. (N,) labels."""
    from sklearn.cluster import DBSCAN

    distances = (2 - 2 * features @ features.T).clamp_min(0).numpy()
    rank = np.argsort(distances, axis=1, kind="stable")[:, :k1]

    def mutual(i: int, k: int) -> np.ndarray:
        near = rank[i, :k]
        return near[(rank[near, :k] == i).any(axis=1)]

    size, half = len(rank), [mutual(i, round(k1 / 2) + 1) for i in range(len(rank))]
    weights = np.zeros((size, size), dtype=np.float32)
    for i in range(size):
        core = mutual(i, k1)
        more = [half[j] for j in core if len(np.intersect1d(half[j], core)) > 2 / 3 * len(half[j])]
        members = np.unique(np.concatenate([core, *more]))
        weight = np.exp(-distances[i, members])
        weights[i, members] = weight / weight.sum()
    weights = np.stack([weights[near[:k2]].mean(axis=0) for near in rank])
    holders = [np.flatnonzero(column) for column in weights.T]
    jaccard = np.zeros((size, size), dtype=np.float32)
    for i in range(size):
        overlap = np.zeros(size, dtype=np.float32)
        for member in np.flatnonzero(weights[i]):
            others = holders[member]
            overlap[others] += np.minimum(weights[i, member], weights[others, member])
        jaccard[i] = np.maximum(1 - overlap / (2 - overlap), 0)
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(jaccard)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """By how much this process's memory rises above its level at the start; None where Linux's mark is not to be had.

    Codes and graph are scipy's, so that the memory of tensors is not all.
    """

    def status(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is kept of freed memory would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def run_size(num_pictures: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row of the table: times (of processors on the CPU, of all threads of the slowest rank), ratio, memory."""
    features, camids = make_features(num_pictures, options.dim, options.noise)
    features = features.to(device)
    sides: dict[str, Callable[[], object]] = {
        "bare product": lambda: bare_product(features),
        "find_clusters": lambda: find_clusters(features),
    }
    if options.camera_aware:
        sides["camera-aware"] = lambda: find_clusters(features, camids=camids)
    if num_pictures <= options.dense_up_to and distributed.world_size() == 1:
        sides["dense"] = lambda: dense_clusters(features)
    row: dict[str, Any] = {"N": num_pictures, "D": options.dim, "ranks": distributed.world_size()}
    row["threads"] = torch.get_num_threads()
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = harness.alternate(sides, options.rounds, warmup=options.warmup, device=device, clock=clock)
    row |= {f"{side} s": median for side, median in harness.medians(seconds).items()}
    row["find_clusters / product"] = harness.median_ratio(seconds["find_clusters"], seconds["bare product"])
    if options.memory:
        peak = peak_bytes(sides["find_clusters"])
        row["features MiB"], row["above features MiB"] = features.nbytes / 2**20, peak and peak / 2**20
    return row


@command
def main(argv: list[str] | None = None) -> int:
    """Run the sizes asked for and print a table; with --output also write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks clustering", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[4000, 12936, 32621], help="N (%(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="feature length (%(default)s)")
    parser.add_argument("--noise", type=float, default=1.5, help="1.5: a good network, 4: a poor one (%(default)s)")
    parser.add_argument("--dense_up_to", type=int, default=4000, help="N of the dense version (%(default)s)")
    parser.add_argument("--camera_aware", action="store_true", help="measure camera-aware clusters as well")
    parser.add_argument("--processor_time", action="store_true", help="of all threads: steadier on a busy machine")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="leave the peak of memory out")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count (%(default)s)")
    harness.add_options(parser, rounds=3)
    options = parser.parse_args(argv)
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    rows = [run_size(num_pictures, options, device) for num_pictures in options.pictures]
    if distributed.is_main():
        harness.report(options, "clustering", harness.machine(device), rows, harness.markdown_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
