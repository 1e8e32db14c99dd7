"""A run from its first step to its last, and what it leaves: weights, figures, card, summary, report."""

import time
from typing import Any

from ecn_dist import distributed
from ecn_dist.config import flatten
from ecn_dist.models import average_local_statistics, export_weights
from ecn_dist.reporting import model_card, words
from ecn_dist.reporting.report import write_report
from ecn_dist.reporting.run_reader import WEIGHTS
from ecn_dist.training import tracking
from ecn_dist.training.run import Run
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.tracking import log
from ecn_dist.training.trainer import Trainer


def train(run: Run, trainer: Trainer, stop: StopRequest | None = None) -> bool:
    """Train to the end, evaluate, and write exported weights, summary.json, figures and report. Collective.

    The report is made from summary.json, which says only at the very end that the run is finished. False where training
    stopped, saved, on a request to `stop`.
    """
    config, output_dir, method, domains = run.config, run.folder, trainer.method, trainer.domains
    stop = StopRequest() if stop is None else stop  # an unasked one is false
    started = time.monotonic()
    if not trainer.fit(stop):
        log.info("asked to stop by %s: saved at step %d; the same command continues", stop.signal, trainer.step)
        distributed.barrier()
        return False
    wall_seconds = time.monotonic() - started
    summary: dict[str, Any] = {
        "world_size": distributed.world_size(),
        "steps": trainer.step,
        "epochs": config.epochs,
        "wall_seconds": wall_seconds,
        "images_per_second": trainer.pictures / wall_seconds,
        "skipped_steps": trainer.skipped_steps,
        "replaced_pictures": trainer.replaced_pictures,
        "data": {name: model_card.describe_data(index) for name, index in domains.items()},
    }
    average_local_statistics(method)
    # Before the evaluation, so that no failure there costs the model.
    distributed.on_main(lambda: export_weights(method.get_submodule(method.EVALUATED), output_dir / WEIGHTS))
    evaluation = trainer.evaluate(domains.get("target"), "result")
    if evaluation is None:
        log.info("there is no target with query and gallery, so there is nothing to evaluate on")
    else:
        summary["evaluation"] = evaluation.result.summary()
        if warning := words.collapse(summary["evaluation"]):
            log.warning("%s", warning)

    def card_and_summary() -> None:
        if config.checkpoint.keep_best and (best := trainer.checkpoints.best()):
            summary["best"] = {"step": best["step"], "validation": best["validation"]}
            log.info("%s", words.best(summary))
        facts = model_card.Facts(summary)
        model_card.write_card(output_dir / model_card.NAME, method.evaluated, flatten(config), facts)
        run.finish(summary, finished=False)

    distributed.on_main(card_and_summary, str(output_dir))
    labels = method.labels("target")
    if config.logging.figures and (evaluation is not None or labels is not None):
        from ecn_dist.reporting.figures import write_cluster_figures, write_figures  # matplotlib, as in report.py

        with tracking.pictures_for_tensorboard(output_dir, config.logging.tensorboard) as writer:
            if labels is not None:
                train_split = domains["target"].split("train")
                write_cluster_figures(output_dir, train_split, labels, writer=writer, step=trainer.step)
            if evaluation is None:
                distributed.on_main(lambda: write_report(output_dir))
            else:
                shown = {name: domains[name] for name in domains if name != "validation"}
                write_figures(output_dir, evaluation, shown, writer=writer, step=trainer.step)
    distributed.on_main(lambda: run.finish(summary, finished=True))
    return True
