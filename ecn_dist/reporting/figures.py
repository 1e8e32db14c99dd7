"""The pictures and the report of a finished run: what the lower packages draw, given the run's data."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ecn_dist import distributed
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.ranking.evaluating import Evaluation
from ecn_dist.reporting.pictures import Domain, write_run_figures
from ecn_dist.reporting.report import write_report


def write_figures(
    run_folder: Path,
    evaluation: Evaluation,
    indices: Mapping[str, ShardIndex],
    *,
    writer: SummaryWriter | None = None,
    step: int | None = None,
) -> None:
    """Draw the run's figures into figures/ and for TensorBoard's `writer`, and write report.html.

    `indices` has the shard folder "target", and perhaps "source".

    Collective; rank 0 draws.
    """
    reader = ShardReader()
    target = indices["target"]
    query, gallery, train = target.split("query"), target.split("gallery"), target.split("train")

    def read_copy(row: int, camera: int) -> Image.Image | None:
        if camera == train.camids[row]:
            return reader.read_picture(train, row)
        return reader.read_picture(train, row, camera) if train.members["length"][row, camera] else None

    write_run_figures(
        run_folder,
        evaluation.result,
        evaluation.query,
        evaluation.gallery_part,
        read_query=lambda row: reader.read_picture(query, row),
        read_gallery=lambda row: reader.read_picture(gallery, row),
        domains=[_domain(name, index.split("train"), reader) for name, index in indices.items()],
        read_copy=read_copy if train.has_styles else None,
        gallery_sharded=True,
        camera_free=evaluation.camera_free,
        writer=writer,
        step=step,
    )
    distributed.together(lambda: _report(run_folder), f"the report in {run_folder}")


def _domain(name: str, split: SplitIndex, reader: ShardReader) -> Domain:
    return Domain(name, split.camids, lambda row: reader.read_picture(split, row), split.pids)


def _report(run_folder: Path) -> None:
    if distributed.is_main():
        write_report(run_folder)
