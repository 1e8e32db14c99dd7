"""Time and memory of `evaluate_ranking`, beside the bare product of queries and gallery and beside a sort.

The yardstick is what nothing exact can do without: the product of all queries with all gallery features, in chunks.
Features are random clusters: a centre for each person, a shift for each camera, noise.

Shape letters: Q queries, G gallery pictures, D feature length.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from ecn_dist.distributed import resolve_device
from ecn_dist.ranking import KReciprocal, evaluate_ranking


@dataclass(frozen=True)
class Size:
    """A problem of a data set's size."""

    queries: int
    gallery: int
    people: int
    cameras: int


SIZES = {
    "small": Size(2000, 8000, 400, 6),  # what sorts can bear it
    "market": Size(3368, 15913, 750, 6),
    "msmt17": Size(11659, 82161, 3060, 15),
}


@dataclass(frozen=True)
class Problem:
    """Arguments of `evaluate_ranking`, in its order."""

    query_features: Tensor  # (Q, D)
    query_pids: Tensor
    query_camids: Tensor
    gallery_features: Tensor  # (G, D)
    gallery_pids: Tensor
    gallery_camids: Tensor

    @property
    def args(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def make_problem(size: Size, dim: int, noise: float, device: torch.device, seed: int = 0) -> Problem:
    """Normalised clustered features; `noise` 2.5 is a good network, 6 one that hardly works."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(size.people, dim, generator=generator)
    shifts = 0.7 * torch.randn(size.cameras, dim, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        pids = torch.randint(0, size.people, (count,), generator=generator)
        camids = torch.randint(0, size.cameras, (count,), generator=generator)
        features = torch.empty(count, dim)
        for part in torch.arange(count).split(4096):
            drawn = noise * torch.randn(len(part), dim, generator=generator)
            drawn += centres[pids[part]] + shifts[camids[part]]
            features[part] = torch.nn.functional.normalize(drawn)
        return features.to(device), pids.to(device), camids.to(device)

    return Problem(*draw(size.queries), *draw(size.gallery))


def bare_product(problem: Problem, block: int = 2048) -> None:
    """Every query times every gallery picture, in blocks, into one buffer; nothing is done with it."""
    buffer = torch.empty(block * block, device=problem.query_features.device)
    for left in problem.query_features.split(block):
        for right in problem.gallery_features.split(block):
            size = len(left), len(right)
            torch.mm(left, right.T, out=buffer[: size[0] * size[1]].view(size))


def sort_based(problem: Problem) -> float:
    """Mean step-wise average precision by the whole distance matrix and its sort, as the usual tools do."""
    order = torch.cdist(problem.query_features, problem.gallery_features).argsort(dim=1)
    same = problem.gallery_pids[order] == problem.query_pids[:, None]
    junk = same & (problem.gallery_camids[order] == problem.query_camids[:, None])
    rank = (~junk).cumsum(1)
    match = same & ~junk
    valid = match.any(1)
    precision = match.cumsum(1) / rank.clamp_min(1)
    return float(((precision * match).sum(1) / match.sum(1).clamp_min(1))[valid].double().mean())


def run_size(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row of the table: times, ratio to the bare product, memory of tensors above the inputs."""
    problem = make_problem(SIZES[name], options.dim, options.noise, device)
    sides: dict[str, Callable[[], object]] = {
        "bare product": lambda: bare_product(problem),
        "evaluate_ranking": lambda: evaluate_ranking(*problem.args),
    }
    if name == "small":
        sides["sort"] = lambda: sort_based(problem)
    if options.rerank:
        sides["re-ranked"] = lambda: evaluate_ranking(*problem.args, rerank=KReciprocal())
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = harness.alternate(sides, options.rounds, device=device, clock=clock)
    row: dict[str, Any] = {"size": name, "Q": len(problem.query_pids), "G": len(problem.gallery_pids)}
    row["D"] = options.dim
    row |= {f"{side} s": median for side, median in harness.medians(seconds).items()}
    row["evaluate / product"] = harness.median_ratio(seconds["evaluate_ranking"], seconds["bare product"])
    row["above inputs MiB"] = harness.peak_tensor_bytes(sides["evaluate_ranking"], device) / 2**20
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the sizes asked for and print a table; with --output also write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "market"], help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="feature length (%(default)s)")
    parser.add_argument("--noise", type=float, default=2.5, help="2.5: a good network, 6: a poor one (%(default)s)")
    parser.add_argument("--rerank", action="store_true", help="measure k-reciprocal re-ranking as well")
    harness.add_options(parser, rounds=3)
    options = parser.parse_args(argv)
    device = resolve_device(options.device)
    rows = [run_size(name, options, device) for name in options.sizes]
    harness.report(options, "evaluation", harness.machine(device), rows, harness.markdown_table(rows))
    return 0
