"""`synthesize`: draw a synthetic domain as a Market-1501 style folder."""

import argparse
import sys
import time

from ecn_dist.command import at_least, command
from ecn_dist.processes import progress_bar
from ecn_dist.synthetic import PRESETS, DomainSize, write_domain

EPILOG = """
Train, test and validation identities never overlap, and a picture depends on nothing but the seed, the domain, the
identity, the camera and its number: a larger folder holds the smaller one's pictures, and --test_split validation
changes only the query and the gallery. The same options give the same bytes for any number of workers. The cameras of
the -strong domains mix colours, blur and haze, which style copies by histogram cannot follow.

example:
  ecn-dist synthesize --domain target --output data/target --seed 0
  ecn-dist synthesize --domain source --output data/large --train_identities 2000 --cameras 8 --height 256 --width 128
"""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="ecn-dist synthesize",
        description="Draw pedestrians procedurally and write them as a Market-1501 style folder of JPEGs: "
        "bounding_box_train, bounding_box_test (the gallery) and query (one picture per identity and camera).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parse.add_argument
    option("--domain", choices=sorted(PRESETS), required=True, help="what people, places and cameras look like")
    option("--output", required=True, metavar="FOLDER", help="the folder to make; left alone if it holds just this")
    option("--seed", type=int, default=0, metavar="N", help="another seed is another world (default 0)")
    option("--train_identities", type=int, default=80, metavar="N", help="people to train on (default 80)")
    option("--test_identities", type=int, default=40, metavar="N", help="other people, to test on (default 40)")
    option("--cameras", type=int, default=4, metavar="N", help="cameras that see everybody (default 4)")
    option("--pictures_per_camera", type=int, default=3, metavar="N", help="of each person by each (default 3)")
    option("--height", type=int, default=64, metavar="PIXELS", help="of a picture (default 64)")
    option("--width", type=int, default=32, metavar="PIXELS", help="of a picture (default 32)")
    option(
        "--test_split",
        choices=("test", "validation"),
        default="test",
        help="which people are query and gallery: choose settings on validation, report test (default test)",
    )
    option("--workers", type=at_least(1), metavar="N", help="processes (default: one for each core, if it is worth it)")
    return parse


@command
def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    start = time.perf_counter()
    size = DomainSize(
        train_identities=options.train_identities,
        test_identities=options.test_identities,
        cameras=options.cameras,
        pictures_per_camera=options.pictures_per_camera,
        height=options.height,
        width=options.width,
        test_split=options.test_split,
    )
    with progress_bar() as track:
        spec = PRESETS[options.domain]
        count = write_domain(options.output, spec, size, seed=options.seed, workers=options.workers, track=track)
    print(f"{options.output}: {count} pictures of {options.domain} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
