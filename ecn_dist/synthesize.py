"""`synthesize`: draw a synthetic domain as a Market-1501 style folder."""

import os
import sys
import time
from typing import Annotated, Literal

from ecn_dist.command import at_least, verb
from ecn_dist.synthetic import PRESETS, write_domain

EPILOG = """\
Train, test and validation identities never overlap, and a picture depends on nothing but the seed, the domain, the
identity, the camera and its number: a larger folder holds the smaller one's pictures, and --test_split validation
changes only the query and the gallery. The same options give the same bytes for any number of workers.

examples
  ecn-dist synthesize --domain target --output data/target --seed 0
  ecn-dist synthesize --domain source --output data/large --train_identities 2000 --cameras 8 --height 256 --width 128
"""


@verb("synthesize", EPILOG)
def main(
    *,
    domain: Annotated[str, tuple(sorted(PRESETS))],
    output: str,
    seed: Annotated[int, at_least(0)] = 0,
    train_identities: int = 80,
    test_identities: int = 40,
    cameras: int = 4,
    pictures_per_camera: int = 3,
    height: int = 64,
    width: int = 32,
    test_split: Literal["test", "validation"] = "test",
    workers: Annotated[int, at_least(1)] = os.cpu_count() or 1,
) -> int:
    """Draw pedestrians procedurally and write them as a Market-1501 style folder of JPEGs.

    bounding_box_train, bounding_box_test (the gallery) and query (one picture of each identity by each camera).

    Args:
        domain: what people, places and cameras look like
        output: the folder to make; left alone if it holds just this
        seed: another seed is another world
        train_identities: people to train on
        test_identities: other people, to test on
        cameras: cameras that see everybody
        pictures_per_camera: of each person by each camera
        height: of a picture, in pixels
        width: of a picture, in pixels
        test_split: which people are query and gallery: choose settings on validation, report test
        workers: processes
    """
    start = time.perf_counter()
    count = write_domain(
        output,
        PRESETS[domain],
        seed=seed,
        train_identities=train_identities,
        test_identities=test_identities,
        cameras=cameras,
        pictures_per_camera=pictures_per_camera,
        height=height,
        width=width,
        test_split=test_split,
        workers=workers,
    )
    print(f"{output}: {count} pictures of {domain} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
