"""`synthesize`: draw a synthetic domain as a Market-1501 style folder."""

import time
from typing import Annotated, Literal

from ecn_dist.command import Workers, verb
from ecn_dist.methods.options import Natural
from ecn_dist.synthetic import PRESETS, DomainSize, write_domain

EPILOG = """\
The same options give the same bytes for any number of workers. The cameras of the -strong domains mix colours, blur and
haze, which style copies by histogram cannot follow.

examples
  ecn-dist synthesize --domain target --output data/target --seed 0
  ecn-dist synthesize --domain source --output data/large --train_identities 2000 --cameras 8 --height 256 --width 128
"""


@verb("synthesize", EPILOG)
def main(
    *,
    domain: Annotated[str, tuple(sorted(PRESETS))],
    output: str,
    seed: Natural = 0,
    train_identities: int = 80,
    test_identities: int = 40,
    cameras: int = 4,
    pictures_per_camera: int = 3,
    height: int = 64,
    width: int = 32,
    test_split: Literal["test", "validation"] = "test",
    workers: Workers | None = None,
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
    """
    start = time.perf_counter()
    size = DomainSize(train_identities, test_identities, cameras, pictures_per_camera, height, width, test_split)
    count = write_domain(output, PRESETS[domain], size, seed=seed, workers=workers)
    print(f"{output}: {count} pictures of {domain} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
