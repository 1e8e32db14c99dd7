"""`validate`: check a shard folder and print its summary."""

import sys

from ecn_dist.command import Workers, verb
from ecn_dist.data.index import ShardIndex
from ecn_dist.errors import printable
from ecn_dist.packing.validation import print_summary, validate

EXIT_PROBLEMS = 1


@verb("validate", "Exit status 0 if all is well, 1 with a list of what is wrong if not.")
def main(folder: str, *, workers: Workers | None = None) -> int:
    """Check a shard folder and print its summary.

    Every shard's checksum, every picture decoded, every sample's data against the index.

    Args:
        folder: shard folder, or the URL prefix of one
    """
    index = ShardIndex.load(folder)
    problems = validate(index, workers=workers)
    print_summary(index)
    for problem in problems:
        print(f"wrong: {printable(problem)}", file=sys.stderr)
    if problems:
        return EXIT_PROBLEMS
    print(f"{folder} is sound")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
