"""`train`: a method on a source and a target domain; under torchrun every process is one rank."""

from pathlib import Path

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.checks import dry_run
from ecn_dist.command import command
from ecn_dist.reporting.run_reader import SUMMARY
from ecn_dist.training import building, finishing, tracking
from ecn_dist.training.run import Run, fingerprints
from ecn_dist.training.signals import EXIT_PREEMPTED, stop_on_signals

DESCRIPTION = "Train a method on a labelled source and an unlabelled target domain, or on one of them."


@command
def main(argv: list[str] | None = None) -> int:
    parser = configuration.build_parser("ecn-dist train", DESCRIPTION)
    dry_run.add_options(parser)
    config, options = configuration.parse_with(parser, argv)
    planned = dry_run.Options.of(options)
    config.check()
    if planned is not None:
        dry_run.run(config, planned)
        return 0
    device = distributed.resolve_device(config.device)
    distributed.start(device, config.timeout_seconds)
    distributed.together(lambda: building.check_ranks(config, distributed.world_size()))
    domains = building.open_domains(config)
    output_dir = Path(config.output_dir)
    with Run(config, fingerprints(domains), device.type) as run, stop_on_signals() as stop:
        if not run.claim():
            if distributed.is_main():
                print(f"{output_dir} holds this very run, finished; its results are in {output_dir / SUMMARY}")
            return 0
        distributed.together(lambda: tracking.start_logs(output_dir))
        checkpoint = run.checkpoint()
        trainer = building.build_trainer(config, domains, device, output_dir)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        run.begin(checkpoint)
        finished = finishing.train(run, trainer, stop)
    return 0 if finished else EXIT_PREEMPTED


if __name__ == "__main__":
    raise SystemExit(main())
