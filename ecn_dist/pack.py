"""Turn a folder of pictures into shards."""

import argparse
import sys
import textwrap
from pathlib import Path

from ecn_dist.command import at_least, command
from ecn_dist.data.index import ShardIndex
from ecn_dist.packing.layouts import LAYOUTS, STYLES_FOLDER, read_dataset
from ecn_dist.packing.records import check_queries, first_few
from ecn_dist.packing.shards import check_output, pack
from ecn_dist.packing.styles import KINDS, find_styles
from ecn_dist.packing.summary import print_summary
from ecn_dist.processes import progress_bar

EPILOG = r"""
layouts
  market, duke, msmt17   bounding_box_train/, query/, bounding_box_test/ with names like 0002_c1s1_000451_03.jpg
                         (pid before the first _, camera after c); msmt17 in its reshaped form
  msmt17-original        train/ and test/ with list_train.txt, list_val.txt, list_query.txt, list_gallery.txt
  folder                 any pictures; --pattern or --table says pid, camera and split

A split that the data set does not have is left out: train alone will do for a target. Pictures with pid -1 are junk and
dropped; in layout folder a training picture without a pid is kept, as one whose identity nobody knows.

examples
  python -m ecn_dist.pack --layout market --input data/market --output shards/market
  python -m ecn_dist.pack --layout msmt17-original --input data/MSMT17_V1 --output shards/msmt17 --camera_style none
  python -m ecn_dist.pack --layout folder --input data/shop --output shards/shop --pattern '^cam(?P<camid>\d+)/'
"""


def size(text: str) -> tuple[int, int]:
    """`256x128` as (256, 128)."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256x128 (height x width)")
    return int(height), int(width)


def megabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ecn_dist.pack",
        description=__doc__,
        epilog=textwrap.dedent(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--layout", required=True, choices=LAYOUTS, help="how the data set's folder is arranged")
    add("--input", required=True, type=Path, metavar="FOLDER", help="the data set")
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add(
        "--pattern",
        metavar="REGEX",
        help="layout folder: searched in each picture's path below --input. Named groups: camid, and where known pid "
        "and split (train, query, gallery). Without the group split, folders of these names say it, or all is train",
    )
    add(
        "--table",
        type=Path,
        metavar="CSV",
        help="layout folder: a table with the columns path (below --input), camid, and where known pid and split",
    )
    add(
        "--camera_style",
        choices=KINDS,
        default="auto",
        help="style copies of the training pictures: shipped with the data set, made by histogram matching, or none; "
        "auto is shipped if there are any, else histogram (default: %(default)s)",
    )
    add(
        "--styles_folder",
        default=STYLES_FOLDER,
        metavar="NAME",
        help="folder of the shipped copies, below --input (default: %(default)s)",
    )
    add("--allow_missing_styles", action="store_true", help="pack although shipped copies are missing")
    add("--shard_mib", type=megabytes, default=64, metavar="N", help="size of a shard, about (default: %(default)s)")
    add("--min_shards", type=at_least(1), default=1, metavar="N", help="at least so many shards for each split")
    add("--max_size", type=size, metavar="HxW", help="reduce larger pictures to fit; otherwise a JPEG is kept as it is")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of the samples' order in the shards (default: %(default)s)",
    )
    add("--workers", type=at_least(1), metavar="N", help="processes (default: one for each core, if it is worth it)")
    add("--overwrite", action="store_true", help="replace the shards that --output holds")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    check_output(options.output, options.overwrite)
    dataset = read_dataset(
        options.layout,
        options.input,
        pattern=options.pattern,
        table=options.table,
        styles_folder=options.styles_folder,
    )
    unmatched = check_queries(dataset)  # before anything takes long
    with progress_bar() as track:
        styles = find_styles(
            dataset,
            options.camera_style,
            allow_missing=options.allow_missing_styles,
            workers=options.workers,
            track=track,
        )
        pack(
            dataset,
            options.output,
            styles,
            shard_mib=options.shard_mib,
            min_shards=options.min_shards,
            workers=options.workers,
            seed=options.seed,
            max_size=options.max_size,
            overwrite=options.overwrite,
            track=track,
        )
    print_summary(ShardIndex.load(str(options.output)))
    print(f"style copies: {styles.kind}")
    if styles.unused:
        print(f"{styles.unused} files of {dataset.styles_folder} are no training picture's copy; left out")
    if dataset.ignored:
        print(f"{len(dataset.ignored)} are no pictures, or are there already; left out: {first_few(dataset.ignored)}")
    if unmatched:
        print(f"{unmatched} queries have no true match in the gallery; evaluation does not count them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
