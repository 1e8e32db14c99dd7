"""Time and memory of `evaluate_ranking`, beside the bare product of the same chunks and beside a sort.

The yardstick is what nothing exact can do without: the product of all queries with all gallery features, in the chunks
that the evaluation uses. Features are random clusters: a centre for each person, a shift for each camera, noise.

Shape letters: Q queries, G gallery pictures, D feature length.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.dense_reranking import dense_reranking
from benchmarks.harness import (
    Row,
    add_options,
    alternate,
    machine,
    markdown_table,
    median_ratio,
    medians,
    peak_bytes,
    with_earlier,
    write_results,
)
from ecn_dist.command import command
from ecn_dist.distributed import resolve_device
from ecn_dist.ranking import KReciprocal, evaluate_ranking, rerank_distances
from ecn_dist.ranking.distances import full_precision


@dataclass(frozen=True)
class Size:
    """A problem of a data set's size."""

    queries: int
    gallery: int
    people: int
    cameras: int


SIZES = {
    "small": Size(2000, 8000, 400, 6),  # what sorts, or makes whole tables, can bear it
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

    @property
    def input_bytes(self) -> int:
        return sum(values.nbytes for values in self.args)


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


def bare_product(problem: Problem, block: int, chunk: int) -> None:
    """Every query times every gallery picture, in blocks and chunks, into one buffer; nothing is done with it."""
    query, gallery = problem.query_features, problem.gallery_features
    buffer = torch.empty(block * chunk, dtype=torch.float32, device=query.device)
    with full_precision(query.device):
        for left in query.split(block):
            for right in gallery.split(chunk):
                size = len(left), len(right)
                torch.mm(left, right.T, out=buffer[: size[0] * size[1]].view(size))


def sort_based(problem: Problem) -> float:
    """Mean step-wise average precision by the whole distance matrix and its sort, as the usual tools do."""
    query, gallery = problem.query_features, problem.gallery_features
    with full_precision(query.device):
        order = torch.cdist(query, gallery).argsort(dim=1)
    same = problem.gallery_pids[order] == problem.query_pids[:, None]
    junk = same & (problem.gallery_camids[order] == problem.query_camids[:, None])
    rank = (~junk).cumsum(1)
    match = same & ~junk
    valid = match.any(1)
    precision = match.cumsum(1) / rank.clamp_min(1)
    return float(((precision * match).sum(1) / match.sum(1).clamp_min(1))[valid].double().mean())


def run_size(name: str, problem: Problem, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row of the table: times, ratio to the bare product, memory above the inputs."""
    sides: dict[str, Callable[[], object]] = {
        "bare product": lambda: bare_product(problem, 2048, 2048),
        "evaluate_ranking": lambda: evaluate_ranking(*problem.args),
    }
    if options.sort and name == "small":
        sides["sort"] = lambda: sort_based(problem)
    if options.rerank:
        sides["re-ranked"] = lambda: evaluate_ranking(*problem.args, rerank=KReciprocal())
    seconds = alternate(sides, options.rounds, warmup=0 if name == "msmt17" else 1, device=device)
    row: dict[str, Any] = {
        "size": name,
        "queries": len(problem.query_pids),
        "gallery": len(problem.gallery_pids),
        "dim": problem.query_features.shape[1],
        "inputs_mib": problem.input_bytes / 2**20,
        "seconds": medians(seconds),
        "ratio": median_ratio(seconds["evaluate_ranking"], seconds["bare product"]),
    }
    for side in sides:
        if side != "bare product":
            peak = peak_bytes(sides[side], device)
            row[f"{side} mib"] = None if peak is None else peak / 2**20
    if device.type == "cpu":
        row["cpu_ratio"] = _processor_seconds(sides["evaluate_ranking"]) / _processor_seconds(sides["bare product"])
    if "sort" in sides:
        mine, sorts = evaluate_ranking(*problem.args).mAP_stepwise, sort_based(problem)
        row["sort_differs_by"] = abs(mine - sorts)
    if options.rerank and name == "small" and device.type == "cpu":
        features = problem.query_features, problem.gallery_features
        start = time.perf_counter()
        dense = dense_reranking(*features, KReciprocal())
        row["seconds"]["dense"] = time.perf_counter() - start
        row["dense_differs_by"] = float(abs(rerank_distances(*features).numpy() - dense).max())
    return row


def _processor_seconds(function: Callable[[], object]) -> float:
    """Time of all this process's threads: steadier than the clock where others use the machine."""
    start = time.process_time()
    function()
    return time.process_time() - start


def _seconds(side: str) -> Any:
    return lambda row: row["seconds"].get(side)


def _has(row: dict[str, Any], source: Any) -> bool:
    return (source(row) if callable(source) else row.get(source)) is not None


def _case(row: Row) -> tuple[int, int, bool]:
    return row["gallery"], row["dim"], "re-ranked" in row["seconds"]


COLUMNS = {
    "size": "size",
    "queries": "queries",
    "gallery": "gallery",
    "D": "dim",
    "bare product s": _seconds("bare product"),
    "evaluate s": _seconds("evaluate_ranking"),
    "ratio": "ratio",
    "processor ratio": "cpu_ratio",
    "above inputs MiB": "evaluate_ranking mib",
    "sort s": _seconds("sort"),
    "sort MiB": "sort mib",
    "re-ranked s": _seconds("re-ranked"),
    "re-ranked MiB": "re-ranked mib",
    "dense re-ranking s": _seconds("dense"),
    "differs by": "dense_differs_by",
}


def _table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        rows, {head: source for head, source in COLUMNS.items() if any(_has(row, source) for row in rows)}
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run the sizes asked for and print a table; with --output also write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "market"], help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="feature length (%(default)s)")
    parser.add_argument("--noise", type=float, default=2.5, help="2.5: a good network, 6: a poor one (%(default)s)")
    parser.add_argument("--no_sort", dest="sort", action="store_false", help="leave the sort-based version out")
    parser.add_argument("--rerank", action="store_true", help="measure k-reciprocal re-ranking as well")
    parser.add_argument("--add", action="store_true", help="keep the other cases of results already in --output")
    add_options(parser, rounds=3)
    options = parser.parse_args(argv)
    device = resolve_device(options.device)
    described = machine(device)
    rows = []
    for name in options.sizes:
        print(f"{name}: {SIZES[name]}, D {options.dim}", flush=True)
        rows.append(run_size(name, make_problem(SIZES[name], options.dim, options.noise, device), options, device))
        print(_table(rows), flush=True)
    if options.output:
        if options.add:
            rows = with_earlier(options.output, "evaluation", described, rows, name=options.machine, case=_case)
        path = write_results(
            options.output, "evaluation", described, rows, name=options.machine, title="Ranking", tables=_table(rows)
        )
        print(f"written: {path} and beside it .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
