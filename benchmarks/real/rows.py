"""Train and evaluate the rows of the benchmark on real pictures, and write their table (docs/results.md).

    python -m benchmarks.real.rows --shards SHARDS --weights mobilenet_v2.safetensors --output_dir RUNS

`--shards` holds cuhk03, market_validation and market_test, packed. Every row starts from the source-only weights of
its seed, and trains on the same target pictures: those of market_validation are those of market_test. A run that is
finished is taken as it is. `--split validation` is for choosing settings, `--split test` for what is reported.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ecn_dist.command import command
from ecn_dist.demo import execute
from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically
from ecn_dist.reporting.run_reader import is_finished, read_run
from ecn_dist.reporting.words import mean_percent

RECIPES = Path(__file__).parent
COLUMNS = {"mAP_stepwise": "mAP (step-wise)", "rank1": "rank-1", "mAP": "mAP (trapezoid)", "mINP": "mINP"}
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe of this folder with options, or how the source-only network is evaluated."""

    name: str
    meaning: str
    folder: str
    recipe: str
    options: str = ""


PROXIES = "--cluster.camera_weight 0.5"
START = Row("source only", "421 identities of CUHK03; where the others start", "source_only", "source_only.yaml")
ROWS = (
    START,
    Row("source only, AdaBN", "BatchNorm statistics of the target", "adabn", "", "--adapt_batchnorm"),
    Row("control", "target passes, no target loss (lambda = 0)", "control", "ecn.yaml", "--loss.target_weight 0"),
    Row("ECN", "exemplar, camera, neighbours", "ecn", "ecn.yaml"),
    Row("cluster", "clusters of the target alone", "cluster", "cluster.yaml", "--cluster.camera_aware false"),
    Row("cluster, camera-aware", "the same, neighbourhoods by camera", "cluster_aware", "cluster.yaml"),
    Row("cluster, proxies", "the same, and camera proxies", "cluster_proxies", "cluster.yaml", PROXIES),
    Row(
        "cluster, source",
        "the same, and the labelled source",
        "cluster_source",
        "cluster.yaml",
        f"{PROXIES} --cluster.source_weight 1",
    ),
)


@dataclass(frozen=True)
class Bench:
    """The benchmark of one seed, in one folder."""

    shards: Path
    weights: Path
    folder: Path
    seed: int
    ranks: int
    split: str

    def figures(self, row: Row) -> Figures:
        """mAP and the like of `row` on the split, and the seconds that its training took; trains what is not there."""
        if not row.recipe:
            return self._evaluated(row, START, *row.options.split())
        weights = self.weights
        if row != START:
            self._trained(START, self.weights)
            weights = self.folder / START.folder / "weights.safetensors"
        run = self._trained(row, weights)
        return dict(self._evaluated(row, row)) | {"seconds": float((read_run(run).summary or {})["wall_seconds"])}

    def _trained(self, row: Row, weights: Path) -> Path:
        run = self.folder / row.folder
        if not is_finished(run):
            places = ["--source", self.shards / "cuhk03", "--target", self.shards / "market_validation"]
            start = ["--model.weights", weights, "--output_dir", run, "--seed", self.seed, *row.options.split()]
            arguments = ["--config", RECIPES / row.recipe, *places, *start]
            execute("ecn_dist.train", *map(str, arguments), ranks=self.ranks if self.ranks > 1 else 0)
        return run

    def _evaluated(self, row: Row, trained: Row, *options: str) -> Figures:
        output = self.folder / f"{row.folder}-{self.split}.json"
        if not output.is_file():
            places = ["--checkpoint", self.folder / trained.folder, "--data", self.shards / f"market_{self.split}"]
            execute("ecn_dist.evaluate", *map(str, places), "--output", str(output), "--workers", "0", *options)
        found = json.loads(output.read_text(encoding="utf-8"))
        return {key: found[key] for key in COLUMNS}


def as_markdown(results: Mapping[str, list[Figures]], rows: Iterable[Row]) -> str:
    """The table: percent, over several seeds the mean and the standard deviation; minutes of one run."""
    table = [["", *COLUMNS.values(), "seeds", "minutes", "what it is"], ["---", *["---:"] * 6, "---"]]
    for row in rows:
        found = results[row.name]
        cells = [mean_percent([figures[key] for figures in found]) for key in COLUMNS]
        seconds = [figures["seconds"] for figures in found if "seconds" in figures]
        minutes = f"{sum(seconds) / len(seconds) / 60:.0f}" if seconds else ""
        table.append([row.name, *cells, str(len(found)), minutes, row.meaning])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--shards", type=Path, required=True, help="folder of the packed data")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights: benchmarks.real.weights")
    parser.add_argument("--output_dir", type=Path, required=True, help="of the runs; outside every repository")
    parser.add_argument("--only", nargs="+", help="names of rows (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ranks", type=int, default=1, help="processes that train")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args(argv)
    known = [row.name for row in ROWS]
    if unknown := [name for name in options.only or () if name not in known]:
        raise UserError(f"--only: there is no row {unknown[0]!r}; there are {', '.join(known)}")
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    results: dict[str, list[Figures]] = {row.name: [] for row in rows}
    for seed in options.seeds:
        folder = options.output_dir / f"seed-{seed}"
        bench = Bench(options.shards, options.weights, folder, seed, options.ranks, options.split)
        for row in rows:
            results[row.name].append(bench.figures(row))
    table = as_markdown(results, rows)
    print(f"\n{options.split} identities, percent\n\n{table}")
    if options.table:
        write_atomically(options.table, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
