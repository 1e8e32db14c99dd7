"""`python -m benchmarks NAME ...`: measure one part of the system on this machine."""

import importlib
import sys

from ecn_dist.command import command

BENCHMARKS = {
    "memory": "the exemplar memory: time, memory and traffic of a step, against bare products and the published way",
    "data": "the data path: samples a second from shards to batches",
    "training": "the whole training step, beside the bare forward, backward and optimiser step",
    "clustering": "pseudo-labels: time and memory against the number of pictures, beside the bare product",
    "evaluation": "ranking metrics: time and memory against gallery size",
    "compare": "two versions of the project on the same work, in turn",
}


def usage() -> str:
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {what}" for name, what in BENCHMARKS.items()]
    head = "usage: python -m benchmarks NAME [options]   (NAME --help for its options)"
    return "\n".join([head, "", *lines])


@command
def main(argv: list[str] | None = None) -> int:
    """Hand the rest of the command line to the benchmark's own main; return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in BENCHMARKS:
        print(f"error: no such benchmark: {name!r}\n{usage()}" if name else usage(), file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
