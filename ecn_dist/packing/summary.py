"""The table that re-ID papers show of a data set, with what the shards add."""

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ecn_dist.data.index import UNKNOWN_PID, ShardIndex
from ecn_dist.errors import printable


def print_summary(index: ShardIndex) -> None:
    """Print identities, images, cameras, shards and style copies of each split, and what was dropped."""
    table = Table("split", title=Text(printable(f"{index.folder} ({index.layout}, {index.num_cameras} cameras)")))
    for name in ("ids", "images", "cameras", "shards", "MiB", "style copies"):
        table.add_column(name, justify="right")
    notes = []
    for name, split in index.splits.items():
        about, shown = index.about["splits"][name], printable(name)
        distractors = about.get("distractors", 0)
        copies = np.count_nonzero(split.members["length"][:, : index.num_cameras])
        mib = f"{sum(shard.bytes for shard in split.shards) / 2**20:.1f}"
        ids, cameras = split.num_identities - bool(distractors), len(np.unique(split.camids))
        table.add_row(Text(shown), *map(str, (ids, len(split), cameras, len(split.shards), mib, copies)))
        counts = {
            "distractors": distractors,
            "junk dropped": about.get("junk_dropped"),
            "of unknown identity": np.count_nonzero(split.pids == UNKNOWN_PID),
            "style copies missing": split.missing_styles if copies else 0,
        }
        if noted := [f"{count} {what}" for what, count in counts.items() if count]:
            notes.append(f"{shown}: {', '.join(noted)}")
    Console().print(table)
    print(*notes, sep="\n", end="\n" if notes else "")
