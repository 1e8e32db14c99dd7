"""`stylize`: learn how each camera renders, and write shards with copies of each picture in the others' styles."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.command import command
from ecn_dist.data import ShardIndex
from ecn_dist.data.index import INDEX_NAME
from ecn_dist.packing.shards import check_output
from ecn_dist.styles import judging, options
from ecn_dist.styles.networks import GENERATOR, Generator, load_generator, save_generator
from ecn_dist.styles.training import StyleTrainer
from ecn_dist.styles.writing import open_data, write_copies
from ecn_dist.training import tracking
from ecn_dist.training.run import Run, fingerprints
from ecn_dist.training.signals import EXIT_PREEMPTED, StopRequest, stop_on_signals
from ecn_dist.training.trained import load_trained


@command
def main(argv: list[str] | None = None) -> int:
    config = options.parse(argv)
    device = distributed.resolve_device(config.device)
    distributed.start(device, config.timeout_seconds)
    index = distributed.together(lambda: open_data(config.data))
    if config.generator:
        _write(config, index, distributed.together(lambda: load_generator(Path(config.generator))), device)
        return 0
    height, width = distributed.together(lambda: options.fitting_size(index.split("train"), config))
    config = replace(config, height=height, width=width)
    with Run(config, fingerprints({"data": index}), device.type, options) as run:
        claimed = run.claim()
        if not claimed and distributed.on_main(lambda: (Path(config.output) / INDEX_NAME).is_file()):
            if distributed.is_main():
                print(f"{run.folder} holds this very run, finished, and {config.output} its copies")
            return 0
        if not distributed.on_main(lambda: (run.folder / GENERATOR).is_file()):  # else the shards may be this run's
            distributed.together(lambda: check_output(Path(config.output), overwrite=False))
        with stop_on_signals() as stop:
            if claimed and not _train(run, index, device, stop):
                return EXIT_PREEMPTED
        generator = distributed.together(lambda: load_generator(run.folder / GENERATOR))
        summary = {"world_size": distributed.world_size(), "steps": config.steps}
        summary |= _write(config, index, generator, device)
        distributed.on_main(lambda: run.finish(summary, finished=True))
    return 0


def _train(run: Run, index: ShardIndex, device: torch.device, stop: StopRequest) -> bool:
    """Train to the end, and export the generator; False where training stopped, saved, on a request. Collective."""
    distributed.together(lambda: tracking.start_logs(run.folder))
    checkpoint = run.checkpoint()
    trainer = distributed.together(lambda: StyleTrainer(run.config, index, device, run.data))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    run.begin(checkpoint)
    started = time.monotonic()
    if not trainer.fit(stop):
        tracking.log.info("asked to stop by %s: saved at step %d; the same command goes on", stop.signal, trainer.step)
        distributed.barrier()
        return False
    tracking.log.info("trained in %.0f s", time.monotonic() - started)
    distributed.on_main(lambda: save_generator(trainer.generator, run.folder / GENERATOR))
    return True


def _write(config: options.Config, index: ShardIndex, generator: Generator, device: torch.device) -> dict[str, Any]:
    """Write the copies; print, and return, how good they are. Collective."""
    write_copies(index, generator.to(device), config, device)
    asked = load_trained(Path(config.checkpoint), device) if config.checkpoint else None

    def judge() -> dict[str, Any]:
        figures = judging.judge(ShardIndex.load(config.output), Path(config.output_dir), asked, device)
        print(f"{config.output}: copies in the styles of {index.num_cameras} cameras; {judging.in_words(figures)}")
        return {"styles": figures}

    return distributed.on_main(judge)


if __name__ == "__main__":
    raise SystemExit(main())
