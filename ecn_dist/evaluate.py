"""Evaluate a trained network on the query and gallery of a shard folder."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ecn_dist import distributed
from ecn_dist.command import at_least, command
from ecn_dist.data import ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.ranking import EvaluationInput
from ecn_dist.ranking.evaluating import RankingOptions, adapt_batchnorm, evaluate_backbone, has_evaluation
from ecn_dist.reporting import words
from ecn_dist.training import building, tracking
from ecn_dist.training.trained import load_trained

EXAMPLE = "example: torchrun --nproc_per_node 2 -m ecn_dist.evaluate --checkpoint runs/m2d --data shards/duke"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ecn-dist evaluate", description=__doc__, epilog=EXAMPLE)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="a run folder, a checkpoint, or a file of weights",
    )
    add("--data", required=True, metavar="FOLDER", help="shards with query and gallery")
    add("--config", type=Path, metavar="YAML", help="the run's configuration, if not found by PATH")
    add("--adapt_batchnorm", action="store_true", help="AdaBN: take BatchNorm statistics from the data's train split")
    add("--rerank", action="store_true", help="rank by k-reciprocal neighbours (k1 20, k2 6, lambda 0.3)")
    add(
        "--expand_queries",
        type=at_least(0),
        default=0,
        metavar="K",
        help="average each query with its K nearest gallery pictures first (default: 0)",
    )
    add(
        "--camera_free",
        action="store_true",
        help="count true matches by the query's own camera as well; so it always is for data of one camera",
    )
    add("--batch_size", type=at_least(1), default=128, help="pictures a rank embeds at once (default: 128)")
    add("--workers", type=at_least(0), default=2, help="loader processes a rank (default: 2)")
    add("--device", default="auto", help="auto (the accelerator, else the CPU), cpu, cuda, ...")
    add(
        "--output",
        type=Path,
        metavar="JSON",
        help="also write the figures, as fractions, and those of each pair of cameras to this file",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    distributed.together(lambda: _check_output(options.output))
    index = distributed.together(lambda: ShardIndex.load(options.data))
    if not has_evaluation(index):
        raise UserError(f"{options.data} lacks query or gallery, it has: {', '.join(index.splits)}", on_all_ranks=True)
    backbone, config = load_trained(options.checkpoint, device, options.config)
    if options.adapt_batchnorm:
        stream = distributed.together(lambda: building.adaptation_batches(config, index.split("train"), device))
        adapt_batchnorm(backbone, stream, config.precision, device)
    size = EvaluationInput(config.data.height, config.data.width, options.batch_size, options.workers)
    ranking = RankingOptions(options.camera_free, options.expand_queries, options.rerank)
    evaluation = evaluate_backbone(backbone, index, size, config.precision, device, ranking)
    summary = evaluation.summary()
    if distributed.is_main():
        print("\n".join(filter(None, (tracking.describe(summary), words.collapse(summary)))))
    distributed.together(lambda: _write(options.output, summary | {"camera_pairs": evaluation.camera_pairs()}))
    return 0


def _check_output(path: Path | None) -> None:
    if path is not None and distributed.is_main() and not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {path.parent}; make it first")


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is None or not distributed.is_main():
        return
    try:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
