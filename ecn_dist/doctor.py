"""Is everything well where a run is to be started? Exit status 0 if so, 1 with remedies if not.

    ecn-dist doctor --source S --target T --output_dir R                                      this host alone
    torchrun --nnodes 2 ... -m ecn_dist.doctor --source S --target T --output_dir R           and between the ranks

It takes the options of `train`, so that the very command line of a run can be looked at before it is started
(MODULE=ecn_dist.doctor launch/SCRIPT ...), and these of its own:
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.checks import group_checks, host_checks
from ecn_dist.checks.dry_run import Plan, make_plan
from ecn_dist.checks.host_checks import Finding, guarded, launched
from ecn_dist.command import command
from ecn_dist.config import Config
from ecn_dist.errors import UserError

EXIT_PROBLEMS = 1
GROUP_CHECKS = ("group", "versions", "clock", "shared", "all_reduce")
Checks = dict[str, Callable[[], Iterable[Finding]]]
Everyones = list[tuple[Finding, list[int]]]  # with the ranks that found it


class GroupFailure(Exception):
    """The ranks could not be connected."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The doctor's own options, and the configuration of the run that it looks at."""
    parser = argparse.ArgumentParser(prog="ecn-dist doctor", allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the options of train, and end")
    parser.add_argument(
        "--only", action="append", metavar="CHECK", help="this check alone; may be given more than once"
    )
    parser.add_argument("--quiet", action="store_true", help="print what is wrong alone")
    parser.add_argument("--min_bandwidth", type=float, default=100.0, metavar="MB/S", help="of an all-reduce (100)")
    parser.add_argument("--max_latency", type=float, default=10.0, metavar="MS", help="of an all-reduce (10)")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if options.help:
        print(__doc__, parser.format_help(), sep="\n")
        rest = ["--help"]
    # Half a minute tells whether ranks can be connected; the run's own timeout is for its longest pauses.
    if not any(option.split("=")[0] == "--timeout_seconds" for option in rest):
        rest = ["--timeout_seconds", "30", *rest]
    return options, configuration.parse(rest, "ecn-dist doctor", "The options of train:")


@command
def main(argv: list[str] | None = None) -> int:
    options, config = parse(sys.argv[1:] if argv is None else argv)
    plans: list[Plan] = []  # the plan of the run, once it is checked
    checks = _host_checks(config, plans)
    known = (*checks, *GROUP_CHECKS)
    for name in options.only or ():
        if name not in known:
            raise UserError(f"--only: there is no check {name}; known are {', '.join(known)}")
    wanted = set(options.only or known)
    findings = [found for name, check in checks.items() if name in wanted for found in guarded(name, check)]
    everyones = [(found, [launched("RANK", 0)]) for found in findings]
    if launched("WORLD_SIZE", 1) > 1:
        try:
            everyones = _with_group(config, plans, options, wanted, findings)
        except (GroupFailure, RuntimeError) as error:  # the others are not to be heard any more: speak for this rank
            failed = error.finding if isinstance(error, GroupFailure) else _broken(error)
            _print([*everyones, (failed, [launched("RANK", 0)])], options.quiet)
            return EXIT_PROBLEMS
    if distributed.is_main():
        _print(everyones, options.quiet)
    return 0 if all(found.ok for found, _ in everyones) else EXIT_PROBLEMS


def _host_checks(config: Config, plans: list[Plan]) -> Checks:
    def check_plan() -> Iterable[Finding]:
        if not (config.source and config.target and config.output_dir):
            yield Finding("plan", "source, target and output_dir were not all given, so no run is planned")
            return
        try:
            config.check()
            plans.append(make_plan(config, launched("WORLD_SIZE", 1)))
        except UserError as error:
            yield Finding("plan", str(error), "correct the option that is named; train --dry_run shows the plan")
            return
        total = plans[0].timeline.total_steps
        yield Finding("plan", f"{total} steps, {plans[0].memory_bytes / 2**30:.2f} GiB of device memory a rank")

    def check_disk() -> Iterable[Finding]:
        needed = plans[0].checkpoint_bytes * (plans[0].checkpoints + 1) if plans else None
        return host_checks.check_disk(config, needed)

    return {
        "torch": host_checks.check_torch,
        "accelerator": partial(host_checks.check_accelerator, config),
        "shm": partial(host_checks.check_shm, config),
        "host": host_checks.check_host,
        "rendezvous": host_checks.check_rendezvous,
        "shards": partial(host_checks.check_shards, config),
        "plan": check_plan,
        "disk": check_disk,
    }


def _with_group(
    config: Config, plans: list[Plan], options: argparse.Namespace, wanted: set[str], findings: list[Finding]
) -> Everyones:
    """Join the process group, look between the ranks, and bring all ranks' findings together. Collective."""
    device = distributed.resolve_device(config.device)
    joined = group_checks.join(config, device)
    if not joined.ok:
        raise GroupFailure(joined)
    gradient_bytes = plans[0].network.trained_parameters * 4 if plans else None
    own_versions = next(iter(host_checks.check_torch())).text
    checks: Checks = {
        "versions": partial(group_checks.check_versions, own_versions),
        "clock": group_checks.check_clock,
        "shared": partial(group_checks.check_shared_folder, config),
        "all_reduce": partial(
            group_checks.check_all_reduce,
            device,
            gradient_bytes,
            least_bandwidth=options.min_bandwidth * 1e6,
            most_latency=options.max_latency / 1e3,
        ),
    }
    findings = [*findings, *([joined] if "group" in wanted else [])]
    findings += [found for name, check in checks.items() if name in wanted for found in check()]
    return group_checks.collect(findings)


def _broken(error: RuntimeError) -> Finding:
    return Finding("group", f"the connection between the ranks broke: {error}", "look at the other ranks' output too")


def _print(everyones: Everyones, quiet: bool) -> None:
    world_size = launched("WORLD_SIZE", 1)
    for found, ranks in everyones:
        if found.ok and quiet:
            continue
        at = "" if len(ranks) == world_size else f"  [rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}]"
        print(f"{'ok' if found.ok else 'WRONG':<7}{found.check:<13}{found.text}{at}")
        if not found.ok:
            print(f"{'':<7}{'remedy':<13}{found.remedy}")
    wrong = sum(not found.ok for found, _ in everyones)
    if not quiet:
        print(f"{wrong} of {len(everyones)} findings are wrong" if wrong else "all is well", flush=True)


if __name__ == "__main__":
    sys.exit(main())
