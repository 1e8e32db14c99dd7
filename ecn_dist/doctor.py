"""`doctor`: is everything well where a run is to be started?"""

from collections.abc import Callable, Iterable
from functools import partial

from jsonargparse.typing import PositiveFloat

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.checks import group_checks, host_checks
from ecn_dist.checks.dry_run import Plan, make_plan
from ecn_dist.checks.host_checks import Finding, guarded, launched
from ecn_dist.command import command
from ecn_dist.config import Config
from ecn_dist.errors import UserError, printable_lines
from ecn_dist.training.building import load_domains
from ecn_dist.training.run import Run, fingerprints

DESCRIPTION = """Is everything well where a run is to be started? Alone it looks at this host, under torchrun at every
rank's, and between the ranks. It takes the options of `train`: the command line of a run can be looked at before it is
started (MODULE=ecn_dist.doctor launch/SCRIPT ...). Exit status 0 if all is well, 1 with remedies if not."""

EXIT_PROBLEMS = 1
CHECKS = ("torch", "accelerator", "shm", "shards", "weights", "plan", "disk")
CHECKS_OF_RANKS = ("group", "versions", "options", "shared", "all_reduce")
CONNECT_SECONDS = 30.0  # tell whether ranks can be connected; a run's own timeout is for its longest pauses


@command
def main(argv: list[str] | None = None) -> int:
    parser = configuration.build_parser("ecn-dist doctor", DESCRIPTION)
    group = parser.add_argument_group("Checks")
    only = f"this check alone, of {', '.join(CHECKS + CHECKS_OF_RANKS)}; may be given more than once"
    group.add_argument("--only", action="append", help=only)
    group.add_argument("--quiet", action="store_true", help="print what is wrong alone")
    group.add_argument("--min_bandwidth", type=PositiveFloat, default=100.0, metavar="MB/S", help="of an all-reduce")
    group.add_argument("--max_latency", type=PositiveFloat, default=10.0, metavar="MS", help="of an all-reduce")
    parser.set_defaults(timeout_seconds=CONNECT_SECONDS)
    config, options = configuration.parse_with(parser, argv)
    wanted = options.only or CHECKS + CHECKS_OF_RANKS
    for name in set(wanted) - {*CHECKS, *CHECKS_OF_RANKS}:
        raise UserError(f"--only: there is no check {name}; known are {', '.join(CHECKS + CHECKS_OF_RANKS)}")
    rank, plans = launched("RANK", 0), list[Plan]()  # the plan of the run, once it is checked
    on_host: dict[str, Callable[[], Iterable[Finding]]] = {
        "torch": host_checks.check_torch,
        "accelerator": partial(host_checks.check_accelerator, config),
        "shm": partial(host_checks.check_shm, config),
        "shards": partial(host_checks.check_data, config),
        "weights": partial(host_checks.check_weights, config),
        "plan": partial(_check_plan, config, plans),
        "disk": lambda: host_checks.check_disk(config, plans[0].disk_bytes if plans else None),
    }
    findings = [found for name, look in on_host.items() if name in wanted for found in guarded(name, look)]
    everyones = [(found, [rank]) for found in findings]
    if launched("WORLD_SIZE", 1) > 1:
        device = distributed.resolve_device(config.device)
        joined = group_checks.join(config, device)
        gradients = plans[0].network.trained_parameters * 4 if plans else None
        limits = {"least_bandwidth": options.min_bandwidth * 1e6, "most_latency": options.max_latency / 1e3}
        between: dict[str, Callable[[], Iterable[Finding]]] = {  # each collective
            "group": lambda: [joined],
            "versions": lambda: group_checks.check_versions(next(iter(host_checks.check_torch())).text),
            "options": lambda: group_checks.check_options(config, _data(config)),
            "shared": partial(group_checks.check_shared_folder, config),
            "all_reduce": partial(group_checks.check_all_reduce, device, gradients, **limits),
        }
        try:
            if joined.ok:
                findings += [found for name, look in between.items() if name in wanted for found in look()]
                everyones = group_checks.collect(findings)
        except RuntimeError as error:
            joined = Finding("group", f"the connection between the ranks broke: {error}", "see the other ranks' output")
        if not joined.ok:  # the others are not to be heard any more: speak for this rank
            _print([*everyones, (joined, [rank])], options.quiet)
            return EXIT_PROBLEMS
    if distributed.is_main():
        _print(everyones, options.quiet)
    return 0 if all(found.ok for found, _ in everyones) else EXIT_PROBLEMS


def _check_plan(config: Config, plans: list[Plan]) -> Iterable[Finding]:
    if not (config.output_dir and (config.source or config.target)):
        return [Finding("plan", "no output_dir, or neither source nor target was given, so no run is planned")]
    try:
        config.check()
        plan = make_plan(config, launched("WORLD_SIZE", 1))
        Run(config, _data(config), distributed.resolve_device(config.device).type).is_to_train()
    except UserError as error:
        return [Finding("plan", str(error), "correct the option that is named; train --dry_run shows the plan")]
    plans.append(plan)
    text = f"{plan.timeline.total_steps} steps, {plan.memory_bytes / 2**30:.2f} GiB of device memory a rank"
    return [Finding("plan", text)]


def _data(config: Config) -> dict[str, str]:
    """The fingerprints of the shard folders; none where one cannot be read, which is another check's finding."""
    try:
        return fingerprints(load_domains(config))
    except (UserError, OSError):
        return {}


def _print(everyones: list[tuple[Finding, list[int]]], quiet: bool) -> None:
    world_size = launched("WORLD_SIZE", 1)
    for found, ranks in everyones:
        if found.ok and quiet:
            continue
        at = "" if len(ranks) == world_size else f"  [rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}]"
        print(f"{'ok' if found.ok else 'WRONG':<7}{found.check:<13}{printable_lines(found.text)}{at}")
        if not found.ok:
            print(f"{'':<7}{'remedy':<13}{printable_lines(found.remedy)}")
    wrong = sum(not found.ok for found, _ in everyones)
    if not quiet:
        well = "all is well" if everyones else f"nothing was looked at: {', '.join(CHECKS_OF_RANKS)} need torchrun"
        print(f"{wrong} of {len(everyones)} findings are wrong" if wrong else well, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
