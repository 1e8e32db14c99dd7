"""`label`: the clusters of a shard folder's pictures by a trained model, in a table."""

import csv
import dataclasses
import io
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from ecn_dist import distributed
from ecn_dist.clustering import find_clusters
from ecn_dist.clustering.quality import cluster_figures
from ecn_dist.command import BatchSize, Checkpoint, Device, Loaders, RunConfig, verb
from ecn_dist.data import SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.errors import UserError
from ecn_dist.files import check_name, write_atomically
from ecn_dist.methods.cluster.options import ClusterOptions
from ecn_dist.methods.options import Count, Positive, check_ranges
from ecn_dist.ranking.features import EvaluationInput, extract_split
from ecn_dist.training.building import load_index
from ecn_dist.training.trained import load_trained


@verb("label", "example: torchrun --nproc_per_node 2 -m ecn_dist.label --checkpoint R --data S --output labels.csv")
def main(
    *,
    checkpoint: Checkpoint,
    data: str,
    output: Path,
    split: Annotated[str, ("train", "query", "gallery")] = "train",
    eps: Positive | None = None,
    min_samples: Count | None = None,
    k1: Count | None = None,
    k2: Count | None = None,
    camera_aware: Literal["run", "true", "false"] = "run",
    k1_intra: Count | None = None,
    k1_inter: Count | None = None,
    copies: bool = False,
    config: RunConfig | None = None,
    batch_size: BatchSize = 128,
    workers: Loaders = 2,
    device: Device = "auto",
) -> int:
    """Cluster the pictures of a shard folder by a trained model, and write a table: file, camera, label.

    The model may be of any method; the clusters are those that `method: cluster` trains on (k-reciprocal
    neighbourhoods, Jaccard distances, DBSCAN). Identities are not used; where the shards have them, the clusters are
    compared with them at the end. Options that are not given are those of the run.

    Args:
        data: shard folder
        output: the table to write, ending in .csv: a line a picture, sorted by exemplar index; label -1 is an outlier
        split: which of the folder's splits
        eps: Jaccard distance up to which pictures are near; above 0 and below 1. Higher: fewer and larger clusters
        min_samples: near pictures, itself among them, that make a picture the core of a cluster
        k1: nearest pictures whose mutual ones make a neighbourhood (not with camera_aware)
        k2: nearest pictures whose neighbourhoods are averaged (not with camera_aware)
        camera_aware: neighbourhoods within a camera and across cameras apart; run: as the run had it
        k1_intra: with camera_aware, nearest pictures of the same camera, beside the picture itself
        k1_inter: with camera_aware, nearest pictures of the other cameras
        copies: take the mean feature of a picture and its style copies
    """
    check_name(output, ".csv")
    where = distributed.resolve_device(device)
    distributed.start(where)
    index = load_index(data)
    pictures = distributed.together(lambda: index.split(split))
    backbone, trained = load_trained(checkpoint, where, config)
    given = {"eps": eps, "min_samples": min_samples, "k1": k1, "k2": k2, "k1_intra": k1_intra, "k1_inter": k1_inter}
    given = {name: value for name, value in given.items() if value is not None}
    options = dataclasses.replace(trained.own.get("cluster", ClusterOptions()), **given)
    if camera_aware != "run":
        options = dataclasses.replace(options, camera_aware=camera_aware == "true")
    distributed.together(lambda: _check(options))

    size = EvaluationInput(trained.data.height, trained.data.width, batch_size, workers)
    style = "all" if copies else "real"
    found = extract_split(backbone, pictures, size, device=where, precision=trained.precision, style=style)
    camids = distributed.all_gather_uneven_rows(found.camids).cpu()
    labels = find_clusters(
        found.features, camids=camids if options.camera_aware else None, sharded=True, **options.search_arguments()
    ).labels.numpy()

    part, rank = distributed.RowPartition(len(pictures), distributed.world_size()), distributed.rank()
    own = range(part.start(rank), part.stop(rank))  # the rows that this rank embedded
    names = distributed.together(lambda: ShardReader().read_file_names(pictures, own))
    files = list(chain(*distributed.gather_objects(names)))
    distributed.together(lambda: _write(output, pictures, labels, files) if distributed.is_main() else None)
    return 0


def _check(options: ClusterOptions) -> None:
    check_ranges(options, "--")
    if options.k2 > options.k1:
        raise UserError(f"--k2: {options.k2} must be at most --k1 ({options.k1})")


def _write(path: Path, split: SplitIndex, labels_N: np.ndarray, files: list[str]) -> None:
    """The table, and on the console what it says in sum."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("file", "camera", "label"))
    for row in np.argsort(split.indices).tolist():
        table.writerow((files[row], int(split.camids[row]), int(labels_N[row])))
    write_atomically(path, text.getvalue())
    figures = cluster_figures(labels_N, split.camids, split.pids if (split.pids >= 0).any() else None)
    found, outliers = figures["clusters"], figures["outliers"]
    print(f"wrote {path}: {len(files):,} pictures, {found:,.0f} clusters, {outliers:,.0f} outliers")
    if not found or outliers > len(files) / 2:
        print("  most pictures are near no other: raise --eps, or take a model that was trained for such pictures")
    if not found:
        return
    size, share = figures["cluster_size_mean"], figures["cluster_cross_camera"]
    print(f"  {size:.1f} pictures a cluster, {figures['cluster_size_max']:,.0f} in the largest", end="")
    print(f"; {share:.0%} of the pairs in a cluster are from two cameras" if split.num_cameras > 1 else "")
    if found == 1:
        print("  everything is one cluster: lower --eps")
    if "cluster_ami" in figures:
        print(f"  agreement with the known identities (AMI, over clustered pictures): {figures['cluster_ami']:.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
