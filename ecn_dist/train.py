"""Train ECN on a labelled source and an unlabelled target domain.

    torchrun --nproc_per_node 2 -m ecn_dist.train --config configs/demo.yaml --source S --target T --output_dir R

Under torchrun every process is one rank; without it there is one. See README.md and `--help`.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.checks import dry_run
from ecn_dist.command import command
from ecn_dist.config import Config
from ecn_dist.data import ShardIndex
from ecn_dist.models import average_local_statistics, export_weights
from ecn_dist.ranking import EvaluationInput
from ecn_dist.ranking.evaluating import Evaluation, evaluate_backbone, has_evaluation
from ecn_dist.reporting import model_card
from ecn_dist.reporting.figures import write_figures
from ecn_dist.training import building, run_folder, tracking
from ecn_dist.training.signals import EXIT_PREEMPTED, StopRequest, stop_on_signals
from ecn_dist.training.tracking import log
from ecn_dist.training.trainer import Trainer

DESCRIPTION = "Train ECN on a labelled source and an unlabelled target domain."


@command
def main(argv: list[str] | None = None) -> int:
    dry_run_options, argv = dry_run.split_options(sys.argv[1:] if argv is None else argv)
    config = configuration.parse(argv, "ecn-dist train", f"{DESCRIPTION} {dry_run.HELP}")
    config.check()
    if dry_run_options is not None:
        dry_run.run(config, dry_run_options)
        return 0
    device = distributed.resolve_device(config.device)
    distributed.start(device, config.timeout_seconds)
    config.check_ranks(distributed.world_size())
    source, target = building.open_domains(config)
    output_dir = Path(config.output_dir)
    data = {"source": model_card.fingerprint(source), "target": model_card.fingerprint(target)}
    if not run_folder.claim(config, data):
        if distributed.is_main():
            print(f"{output_dir} holds this very run, finished; its results are in {output_dir / run_folder.SUMMARY}")
        return 0
    tracking.start_logs(output_dir)
    checkpoint = run_folder.starting_point(config, data)
    with stop_on_signals() as stop:
        trainer = build_trainer(config, source, target, device, output_dir, data)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        run_folder.begin(config, checkpoint)
        finished = train(config, trainer, source, target, device, stop)
    return 0 if finished else EXIT_PREEMPTED


def build_trainer(
    config: Config,
    source: ShardIndex,
    target: ShardIndex,
    device: torch.device,
    output_dir: Path,
    data: dict[str, str] | None = None,
) -> Trainer:
    """Network, strategy, memory and streams of a run. Collective."""
    source_train, target_train = source.split("train"), target.split("train")
    timeline, streams = distributed.together(lambda: building.build_streams(config, source_train, target_train, device))
    network = distributed.together(lambda: building.build_network(config, source_train.num_identities, device))
    strategy = building.build_strategy(config, network, device)
    memory = distributed.together(lambda: building.build_memory(config, target_train, device))
    log.info(
        "%d ranks on %s; source %d pictures of %d identities, target %d pictures of %d cameras; %d steps an epoch",
        distributed.world_size(),
        device,
        len(source_train),
        source_train.num_identities,
        len(target_train),
        target_train.num_cameras,
        timeline.steps_per_epoch,
    )
    return Trainer(config, strategy, memory, timeline, streams, output_dir, data)


def train(
    config: Config,
    trainer: Trainer,
    source: ShardIndex,
    target: ShardIndex,
    device: torch.device,
    stop: StopRequest | None = None,
) -> bool:
    """Train to the end, evaluate, and write exported weights, summary.json, figures and report. Collective.

    The report is made from summary.json, which says only at the very end that the run is finished. False where training
    stopped, saved, on a request to `stop`.
    """
    output_dir = Path(config.output_dir)
    size = EvaluationInput(config.data.height, config.data.width, config.evaluation.batch_size, config.data.workers)

    def evaluate() -> Evaluation:
        average_local_statistics(trainer.strategy.network)
        return evaluate_backbone(trainer.strategy.network.backbone, target, size, config.precision, device)

    def after_epoch(epoch: int) -> dict[str, Any] | None:
        every = config.evaluation.every_epochs
        if every and (epoch + 1) % every == 0 and epoch + 1 < config.epochs and has_evaluation(target):
            figures = evaluate().summary()
            log.info("epoch %d: %s", epoch, tracking.describe(figures))
            return figures
        return None

    started, first_step = time.monotonic(), trainer.step
    if not trainer.fit(after_epoch, stop):
        asked = f"by {stop.signal}" if stop else "through another rank"
        log.info("asked to stop %s: saved at step %d; the same command continues from there", asked, trainer.step)
        distributed.barrier()
        return False
    wall_seconds = time.monotonic() - started
    summary: dict[str, Any] = {
        "world_size": distributed.world_size(),
        "steps": trainer.step,
        "epochs": config.epochs,
        "wall_seconds": wall_seconds,
        "images_per_second": trainer.images_since(first_step) / wall_seconds,
        "skipped_steps": trainer.skipped_steps,
        "replaced_pictures": trainer.replaced_pictures,
        "data": {"source": model_card.describe_data(source), "target": model_card.describe_data(target)},
    }
    evaluation = evaluate() if has_evaluation(target) else None
    if evaluation is None:
        log.info("the target has no query and gallery, so there is nothing to evaluate on")
    else:
        summary["evaluation"] = evaluation.summary()
        log.info("result: %s", tracking.describe(summary["evaluation"]))
    if distributed.is_main():
        network, card = trainer.strategy.network, output_dir / model_card.NAME
        export_weights(network, output_dir / run_folder.WEIGHTS)
        model_card.write_card(card, network.backbone, configuration.flatten(config), model_card.Facts(summary))
        run_folder.write_summary(output_dir, summary, finished=False)
    if evaluation is not None and config.logging.figures:
        with tracking.pictures_for_tensorboard(output_dir, config.logging.tensorboard) as writer:
            write_figures(output_dir, evaluation, source, target, writer=writer, step=trainer.step)
    if distributed.is_main():
        run_folder.write_summary(output_dir, summary, finished=True)
    distributed.barrier()
    return True


if __name__ == "__main__":
    sys.exit(main())
