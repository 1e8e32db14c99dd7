"""`demo`: synthetic domains -> shards -> training with and without the method -> a table, pictures, a report."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from ecn_dist.command import verb
from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically
from ecn_dist.methods.options import Count, Natural
from ecn_dist.reporting.report import write_report
from ecn_dist.reporting.run_reader import is_finished, read_run
from ecn_dist.reporting.words import mean_percent, percent

CONFIG = Path(str(resources.files("ecn_dist") / "configs" / "demo.yaml"))
CLUSTER, HHL, FMCL, CAMSTYLE = "demo_cluster.yaml", "demo_hhl.yaml", "demo_fmcl.yaml", "demo_camstyle.yaml"
NO_COPIES = "--data.camera_style false"
TARGET_ALONE = f"{NO_COPIES} --cluster.source_weight 0"
ABLATION_SEEDS = 3
RANKS = min(2, os.cpu_count() or 1)
BY_HAND = "\n# Camera styles"  # in the table's file: from here on it is kept
TABLE_WIDTH = 125  # columns, where the output goes to a file
COLUMNS = {"mAP": "mAP (trapezoid)", "mAP_stepwise": "mAP (step-wise)", "rank1": "rank-1", "rank5": "rank-5"}
Evaluation = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is trained on from the common start, or how the start itself is evaluated."""

    name: str
    meaning: str
    folder: str
    options: str = ""
    recipe: str = ""  # among the configurations; empty for --config
    trains: bool = True


SOURCE_ONLY = Row("source only", "trained on the source alone", "source_only", trains=False)
FULL = Row("E + C + N", "exemplar, camera, neighbours", "ECN")
ABLATION_ROWS = (
    SOURCE_ONLY,
    Row("source only, AdaBN", "BatchNorm statistics of the target", "source_only", "--adapt_batchnorm", trains=False),
    Row("control", "target passes, no target loss (lambda = 0)", "control", "--loss.target_weight 0"),
    Row("E", "exemplar", "E", f"{NO_COPIES} --loss.num_neighbors 0"),
    Row("E + C", "exemplar, camera", "EC", "--loss.num_neighbors 0"),
    Row("E + N", "exemplar, neighbours", "EN", NO_COPIES),
    FULL,
    Row("cluster, target alone", "without copies and source", "cluster_alone", TARGET_ALONE, CLUSTER),
    Row("cluster, no copies", "the same without style copies", "cluster_real", NO_COPIES, CLUSTER),
    Row("cluster", "clusters, camera-aware, with copies and source", "cluster", recipe=CLUSTER),
    Row("HHL, no triplets", "target passes, no triplet loss", "hhl_control", "--hhl.triplet_weight 0", HHL),
    Row("HHL, no copies", "triplets of source identities and real target pictures", "hhl_real", NO_COPIES, HHL),
    Row("HHL", "triplets across cameras and domains", "hhl", recipe=HHL),
    Row("FMCL, no copies", "momentum encoder, real pictures", "fmcl_real", NO_COPIES, FMCL),
    Row("FMCL", "momentum encoder, with copies", "fmcl", recipe=FMCL),
    Row("CamStyle, no copies", "source alone, a second batch of real pictures", "camstyle_real", NO_COPIES, CAMSTYLE),
    Row("CamStyle", "source alone, with its own copies", "camstyle", recipe=CAMSTYLE),
)
DEMO_ROWS = tuple(row for row in ABLATION_ROWS if row.name in ("source only", "control", "E + C + N", "cluster"))


def train_rows(
    rows: Sequence[Row], folder: Path, *, seed: int, ranks: int, test_split: str, config: Path
) -> dict[str, Evaluation]:
    """Data, shards, the common start, then every row; what an earlier call finished is taken as it is."""
    shards = {domain: folder / "shards" / domain for domain in ("source", "target")}
    for domain, packed in shards.items():
        if not (packed / "index.json").is_file():
            print(f"\n==> {domain}: drawing pictures, packing them into shards", flush=True)
            data = f"{folder / 'data' / domain}"
            options = ["--domain", domain, "--seed", f"{seed}", "--test_split", test_split]
            execute("ecn_dist.synthesize", *options, "--output", data)
            options = ["--layout", "market", "--input", data, "--output", f"{packed}"]
            execute("ecn_dist.pack", *options, "--camera_style", "histogram")

    def train(row: Row, *options: str) -> Path:
        run = folder / row.folder
        if not is_finished(run):
            print(f"\n==> training: {row.meaning}", flush=True)
            recipe = CONFIG.with_name(row.recipe) if row.recipe else config
            places = [part for domain, packed in shards.items() for part in (f"--{domain}", f"{packed}")]
            options = ("--output_dir", f"{run}", "--seed", f"{seed}", *row.options.split(), *options)
            execute("ecn_dist.train", "--config", f"{recipe}", *places, *options, ranks=ranks)
        return run

    start = train(SOURCE_ONLY, "--epochs", "0")
    weights = ["--model.weights", f"{start / 'weights.safetensors'}", "--optim.source_only_epochs", "0"]
    found: dict[str, Evaluation] = {}
    for row in rows:
        if row.trains or not row.options:
            found[row.name] = dict(read_run(train(row, *weights) if row.trains else start).evaluation)
            continue
        print(f"\n==> evaluating: {row.meaning}", flush=True)
        output = folder / "adabn.json"
        places = ["--checkpoint", f"{start}", "--data", f"{shards['target']}", "--output", f"{output}"]
        execute("ecn_dist.evaluate", *places, "--workers", "0", *row.options.split(), ranks=ranks)
        figures = json.loads(output.read_text(encoding="utf-8"))
        found[row.name] = {key: figures[key] for key in figures if key != "camera_pairs"}
    return found


def execute(module: str, *args: str, ranks: int = 0) -> None:
    """Run one of the project's commands, on ranks where it is told how many, and show it as a user would type it.

    Raises `UserError` where it fails.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [*torchrun, "-m", module, *args]
    print("$", "torchrun" if ranks else "python", shlex.join(command[2 if ranks else 0 :]), flush=True)
    finished = subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if finished.returncode != 0:
        raise UserError(f"the command above ended with status {finished.returncode}; what it printed says why")


def as_cells(results: dict[str, list[Evaluation]], rows: Sequence[Row]) -> list[list[str]]:
    """Percent; over several seeds the mean and, behind the sign, the standard deviation."""
    of_row = {row: [mean_percent([found[key] for found in results[row.name]]) for key in COLUMNS] for row in rows}
    return [[row.name, *of_row[row], row.meaning] for row in rows]


def as_markdown(results: dict[str, list[Evaluation]], rows: Sequence[Row]) -> str:
    """docs/ablation.md: the table of means, the mAP of every seed, and what gave them."""
    seeds = len(results[SOURCE_ONLY.name])
    each_seed = [[row.name, *(percent(found["mAP"]) for found in results[row.name])] for row in rows]
    head = f"""# Ablation on the synthetic domains

Made by `make ablation`: {seeds} seeds, each with data, initial weights and order of its own. Every row but
the first two trains on from that seed's source-only network. Test identities; percent; mean ± standard
deviation over the seeds. Rows of clusters take 480 steps, all others that train on take 192.
"""
    means = [["", *COLUMNS.values(), "what it is"], ["---", *["---:"] * len(COLUMNS), "---"], *as_cells(results, rows)]
    seed_by_seed = [["", *(f"seed {seed}" for seed in range(seeds))], ["---", *["---:"] * seeds], *each_seed]
    tables = ("\n".join(f"| {' | '.join(cells)} |" for cells in table) for table in (means, seed_by_seed))
    return "\n".join((head, "\n\nmAP (trapezoid) of each seed:\n\n".join(tables), ""))


@verb("demo")
def main(
    *,
    output_dir: Path = Path("runs/demo"),
    ablation: bool = False,
    table: Path | None = None,
    seed: Natural = 0,
    ranks: Count = RANKS,
    config: Path = CONFIG,
    test_split: Literal["test", "validation"] = "test",
) -> int:
    """Draw two synthetic domains, pack them, train with and without the method; then a table, pictures, a report.

    Every step runs the project's own commands, as a user would; each is printed.

    Args:
        output_dir: where it all goes
        ablation: every row of the table, over several seeds
        table: also write the table to this Markdown file, whose part on camera styles is kept
        seed: of data and training; the first one with --ablation
        ranks: processes that train
        config: the recipe
        test_split: which people are evaluated on; settings are chosen on validation, and reported on test
    """
    rows = ABLATION_ROWS if ablation else DEMO_ROWS
    started = time.monotonic()
    results: dict[str, list[Evaluation]] = {row.name: [] for row in rows}
    for nth in range(ABLATION_SEEDS if ablation else 1):
        folder = output_dir / f"seed-{nth}" if ablation else output_dir
        found = train_rows(rows, folder, seed=seed + nth, ranks=ranks, test_split=test_split, config=config)
        for name, evaluation in found.items():
            results[name].append(evaluation)
        report = write_report(folder / FULL.folder, comparison={n: [e] for n, e in found.items()})
    print()
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    figures = (Column(title, justify="right") for title in COLUMNS.values())
    shown = Table("", *figures, "what it is", title="target domain, test identities (percent)")
    for cells in as_cells(results, rows):
        shown.add_row(*cells)
    console.print(shown)
    if table:
        there = table.read_text(encoding="utf-8") if table.is_file() else ""
        write_atomically(table, as_markdown(results, rows) + "".join(there.partition(BY_HAND)[1:]))
        print(f"table:    {table}")
    print(f"pictures: {report.parent / 'figures'}")
    print(f"report:   {report}")
    print(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
