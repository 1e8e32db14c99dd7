"""`evaluate`: how well a trained network retrieves on the query and gallery of a shard folder."""

import json
from pathlib import Path

from ecn_dist import distributed
from ecn_dist.command import BatchSize, Checkpoint, Device, Loaders, RunConfig, verb
from ecn_dist.errors import UserError
from ecn_dist.files import check_name, write_atomically
from ecn_dist.methods.options import Natural
from ecn_dist.ranking import evaluating
from ecn_dist.reporting import words
from ecn_dist.training import feeding, tracking
from ecn_dist.training.building import load_index
from ecn_dist.training.trained import load_trained


@verb("evaluate", "example: torchrun --nproc_per_node 2 -m ecn_dist.evaluate --checkpoint runs/m2d --data shards/duke")
def main(
    *,
    checkpoint: Checkpoint,
    data: str,
    config: RunConfig | None = None,
    adapt_batchnorm: bool = False,
    rerank: bool = False,
    expand_queries: Natural = 0,
    camera_free: bool = False,
    batch_size: BatchSize = 128,
    workers: Loaders = 2,
    device: Device = "auto",
    output: Path | None = None,
) -> int:
    """Evaluate a trained network on the query and gallery of a shard folder: mAP, CMC, mINP.

    Args:
        data: shard folder with query and gallery
        adapt_batchnorm: AdaBN: take BatchNorm statistics from the data's train split
        rerank: rank by k-reciprocal neighbours (k1 20, k2 6, lambda 0.3)
        expand_queries: average each query with so many of its nearest gallery pictures first
        camera_free: count true matches by the query's own camera as well; so it always is for data of one camera
        output: also write the figures, as fractions, and those of each pair of cameras to this file (JSON)
    """
    where = distributed.resolve_device(device)
    distributed.start(where)
    if output is not None:
        distributed.together(lambda: check_name(output, output.suffix) if distributed.is_main() else None)
    index = load_index(data)
    if not evaluating.has_evaluation(index):
        raise UserError(f"{data} lacks query or gallery, it has: {', '.join(index.splits)}", on_all_ranks=True)
    backbone, trained = load_trained(checkpoint, where, config)
    if adapt_batchnorm:
        stream = distributed.together(lambda: feeding.adaptation_batches(trained, index.split("train"), where))
        evaluating.adapt_batchnorm(backbone, stream, trained.precision, where)
    size = evaluating.EvaluationInput(trained.data.height, trained.data.width, batch_size, workers)
    ranking = evaluating.RankingOptions(camera_free, expand_queries, rerank)
    evaluation = evaluating.evaluate_backbone(backbone, index, size, trained.precision, where, ranking)
    summary = evaluation.result.summary()
    if distributed.is_main():
        print("\n".join(filter(None, (tracking.describe(summary), words.collapse(summary)))))
    figures = json.dumps(summary | {"camera_pairs": evaluation.camera_pairs()}, indent=1) + "\n"
    if output is not None:
        distributed.together(lambda: write_atomically(output, figures) if distributed.is_main() else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
