"""Check a shard folder and print its summary. Exit status 0 if all is well, 1 with a list of what is wrong if not."""

import argparse
import sys

from ecn_dist.command import at_least, command
from ecn_dist.data.index import ShardIndex
from ecn_dist.packing.summary import print_summary
from ecn_dist.packing.validation import validate
from ecn_dist.processes import progress_bar

EXIT_PROBLEMS = 1


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ecn_dist.validate",
        description=f"{__doc__} Every shard's checksum, every picture decoded, every sample's data against the index.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="shard folder, or the URL prefix of one")
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="processes (default: one for each core, if it is worth it)"
    )
    options = parser.parse_args(argv)
    index = ShardIndex.load(options.folder)
    with progress_bar() as track:
        problems = validate(index, workers=options.workers, track=track)
    print_summary(index)
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if problems:
        return EXIT_PROBLEMS
    print(f"{options.folder} is sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
