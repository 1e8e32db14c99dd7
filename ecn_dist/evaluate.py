"""Evaluate a trained network on the query and gallery of a shard folder."""

import argparse
import json
import sys
from pathlib import Path

from ecn_dist import distributed
from ecn_dist.command import command
from ecn_dist.data import ShardIndex
from ecn_dist.engine import building, tracking
from ecn_dist.engine.evaluating import InputSize, adapt_batchnorm, evaluate_backbone, has_evaluation
from ecn_dist.engine.trained import load_trained
from ecn_dist.errors import UserError

EXAMPLE = "example: torchrun --nproc_per_node 2 -m ecn_dist.evaluate --checkpoint runs/m2d --data shards/duke"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ecn-dist evaluate", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="a run folder, a checkpoint, or a file of weights",
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="shards with query and gallery")
    parser.add_argument("--config", type=Path, metavar="YAML", help="the run's configuration, if not found by PATH")
    parser.add_argument(
        "--adapt_batchnorm", action="store_true", help="AdaBN: take BatchNorm statistics from the data's train split"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="pictures a rank embeds at once (default: 128)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes a rank (default: 2)")
    parser.add_argument("--device", default="auto", help="auto (the accelerator, else the CPU), cpu, cuda, ...")
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="also write the figures, as fractions, to this file"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = distributed.resolve_device(options.device)
    distributed.start(device)
    index = distributed.together(lambda: ShardIndex.load(options.data))
    if not has_evaluation(index):
        raise UserError(f"{options.data} lacks query or gallery, it has: {', '.join(index.splits)}", on_all_ranks=True)
    backbone, config = load_trained(options.checkpoint, device, options.config)
    if options.adapt_batchnorm:
        stream = distributed.together(lambda: building.adaptation_stream(config, index.split("train"), device))
        adapt_batchnorm(backbone, stream, config.precision, device)
    size = InputSize(config.data.height, config.data.width, options.batch_size, options.workers)
    summary = evaluate_backbone(backbone, index, size, config.precision, device).summary()
    if distributed.is_main():
        print(tracking.describe(summary))
        if options.output:
            options.output.write_text(json.dumps(summary, indent=1) + "\n")
    distributed.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
