"""`pack`: turn a folder of pictures into shards."""

import argparse
from pathlib import Path
from typing import Annotated, Any

from ecn_dist.command import Workers, verb
from ecn_dist.data.index import ShardIndex
from ecn_dist.errors import printable
from ecn_dist.methods.options import Count, Natural, Positive
from ecn_dist.packing.layouts import LAYOUTS, STYLES_FOLDER, read_dataset
from ecn_dist.packing.records import check_queries, first_few
from ecn_dist.packing.shards import check_output, pack
from ecn_dist.packing.styles import KINDS, find_styles
from ecn_dist.packing.validation import print_summary

EPILOG = r"""
Layouts, junk pictures and missing splits: docs/data.md. A folder of any pictures is layout folder.

examples
  ecn-dist pack --layout market --input data/market --output shards/market
  ecn-dist pack --layout msmt17-original --input data/MSMT17_V1 --output shards/msmt17 --camera_style none
  ecn-dist pack --layout folder --input data/shop --output shards/shop --pattern '^cam(?P<camid>\d+)/'
"""


def size(text: str) -> tuple[int, int]:
    """`256x128` as (256, 128)."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256x128 (height x width)")
    return int(height), int(width)


@verb("pack", EPILOG)
def main(
    *,
    layout: Annotated[str, tuple(LAYOUTS)],
    input: Path,
    output: Path,
    pattern: str | None = None,
    table: Path | None = None,
    camera_style: Annotated[str, KINDS] = "auto",
    styles_folder: str = STYLES_FOLDER,
    allow_missing_styles: bool = False,
    shard_mib: Positive = 64,
    min_shards: Count = 1,
    max_size: Annotated[tuple[int, int], size] | None = None,
    seed: Natural = 0,
    workers: Workers | None = None,
    overwrite: bool = False,
) -> int:
    """Turn a folder of pictures into shards.

    Args:
        layout: how the data set's folder is arranged
        input: folder of the data set
        output: folder where the shards go
        pattern: layout folder: a regular expression, searched in each picture's path below --input. Named groups:
            camid, and where known pid and split (train, query, gallery). Without the group split, folders of these
            names say it, or all is train
        table: layout folder: a CSV file with the columns path (below --input), camid, and where known pid and split
        camera_style: style copies of the training pictures: shipped with the data set, made by histogram matching, or
            none; auto is shipped if there are any, else histogram
        styles_folder: folder of the shipped copies, below --input
        allow_missing_styles: pack although shipped copies are missing
        shard_mib: size of a shard in MiB, about
        min_shards: at least so many shards for each split
        max_size: HxW: reduce larger pictures to fit; otherwise a JPEG is kept as it is
        seed: of the samples' order in the shards
        overwrite: replace the shards that --output holds
    """
    check_output(output, overwrite)
    dataset = read_dataset(layout, input, pattern=pattern, table=table, styles_folder=styles_folder)
    unmatched = check_queries(dataset)  # before anything takes long
    styles = find_styles(dataset, camera_style, allow_missing=allow_missing_styles, workers=workers)
    shards: dict[str, Any] = {"shard_mib": shard_mib, "min_shards": min_shards, "max_size": max_size, "seed": seed}
    pack(dataset, output, styles, **shards, workers=workers, overwrite=overwrite)
    print_summary(ShardIndex.load(str(output)))
    print(f"style copies: {styles.kind}")
    if styles.unused:
        print(f"{styles.unused} files of {dataset.styles_folder} are no training picture's copy; left out")
    if dataset.ignored:
        left_out = printable(first_few(dataset.ignored))
        print(f"{len(dataset.ignored)} are no pictures, or are there already; left out: {left_out}")
    if unmatched:
        print(f"{unmatched} queries have no true match in the gallery; evaluation does not count them")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
