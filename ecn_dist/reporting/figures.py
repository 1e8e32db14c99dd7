"""All figures of a run, by one call, and its report."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ecn_dist import distributed
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.files import write_atomically
from ecn_dist.ranking.evaluating import Evaluation
from ecn_dist.reporting import curves, sheets
from ecn_dist.reporting.montage import png_of
from ecn_dist.reporting.ranked import Answers, Kind, choose_queries
from ecn_dist.reporting.report import FINDINGS, write_report
from ecn_dist.reporting.run_reader import FIGURES, METRICS, merge_steps, read_metrics
from ecn_dist.reporting.sheets import Domain, ReadCopy, ReadPicture

SAMPLE = 500  # queries whose first answers are looked at
Drawn = tuple[str, Figure]  # with the name of its file
_KINDS: dict[Kind, str] = {"best": "The highest AP", "worst": "The lowest AP", "random": "Any"}


def _write(
    run_folder: str | Path, draw: Callable[[], Iterable[Drawn]], writer: SummaryWriter | None, step: int | None
) -> list[Path]:
    """Let rank 0 draw, into figures/ and for TensorBoard; an error of it is raised on all ranks. Collective."""
    folder, written = Path(run_folder) / FIGURES, []

    def write() -> None:
        for name, figure in draw() if distributed.is_main() else ():
            written.append(write_atomically(folder / f"{name}.png", png_of(figure)))
            if writer is not None:
                pixels = np.asarray(Image.open(written[-1]).convert("RGB"))
                writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")

    distributed.together(write, f"the figures in {folder}")
    return written


def write_figures(
    run_folder: Path,
    evaluation: Evaluation,
    indices: Mapping[str, ShardIndex],
    *,
    writer: SummaryWriter | None = None,
    step: int | None = None,
) -> None:
    """Draw the run's figures into figures/ and for TensorBoard's `writer`, and write report.html.

    `indices` has the shard folder "target", and perhaps "source". Collective; rank 0 draws.
    """
    reader = ShardReader()
    train, query, gallery = (indices["target"].split(name) for name in ("train", "query", "gallery"))

    def read_copy(row: int, camera: int) -> Image.Image | None:
        return reader.read_picture(train, row, camera) if train.members["length"][row, camera] else None

    write_run_figures(
        run_folder,
        evaluation,
        read_query=lambda row: reader.read_picture(query, row),
        read_gallery=lambda row: reader.read_picture(gallery, row),
        domains=[_domain(name, indices[name].split("train"), reader) for name in sorted(indices)],  # target is the last
        read_copy=read_copy if train.has_styles else None,
        writer=writer,
        step=step,
    )
    distributed.together(lambda: write_report(run_folder) if distributed.is_main() else None, "the report")


def write_cluster_figures(
    run_folder: str | Path,
    train: SplitIndex,
    labels: np.ndarray,
    *,
    writer: SummaryWriter | None = None,
    step: int | None = None,
) -> list[Path]:
    """Draw some of the clusters into RUN/figures/clusters.png; return what was written.

    Args:
        run_folder: the run's.
        train: the split that was clustered, usually the target's training pictures.
        labels: (n,) integers by exemplar index, as `Method.labels` gives them: the cluster, below 0 for an outlier.
        writer, step: as in `write_figures`.

    It needs no evaluation. Call it before `write_figures`, which writes the report, or write that again. Raises
    `UserError`, on all ranks, for a picture that cannot be read. Collective; rank 0 draws and returns the path.
    """
    domain, labels = _domain("target", train, ShardReader()), np.asarray(labels)[train.indices]
    return _write(run_folder, lambda: [("clusters", sheets.draw_clusters(labels, domain))], writer, step)


def _domain(name: str, split: SplitIndex, reader: ShardReader) -> Domain:
    return Domain(name, split.camids, lambda row: reader.read_picture(split, row), split.pids)


def write_run_figures(
    run_folder: str | Path,
    evaluation: Evaluation,
    *,
    read_query: ReadPicture,
    read_gallery: ReadPicture,
    domains: Sequence[Domain] = (),
    read_copy: ReadCopy | None = None,
    queries: int = 5,
    failures: int = 12,
    top: int = 10,
    seed: int = 0,
    writer: SummaryWriter | None = None,
    step: int | None = None,
) -> list[Path]:
    """Draw every figure of a run into RUN/figures/; return what was written.

    Args:
        run_folder: its metrics.jsonl gives the training curves.
        evaluation: of plain distances, neither re-ranked nor with expanded queries.
        read_query, read_gallery: pictures by row of the queries, of the whole gallery.
        domains, read_copy: the training pictures of each domain, and the style copies of the last of them.
        queries, failures, top: how many queries a sheet of ranked lists and the sheet of failures show, and how long a
            list is; `seed` chooses among equals, and the random ones.
        writer, step: TensorBoard's SummaryWriter gets the same pixels.

    Also writes figures/findings.json, which the report reads: numbers on where the ranking fails. Raises `UserError`,
    on all ranks, for a picture that cannot be read. Collective; rank 0 draws, reads pictures, and returns paths.
    """
    result, answers = evaluation.result, Answers(evaluation)

    def lists_of(kind: Kind, count: int, top: int) -> list:
        return answers.lists(choose_queries(result.average_precision, answers.pids_Q, count, kind, seed), top)

    lists = {kind: lists_of(kind, queries, top) for kind in _KINDS}
    failed = lists_of("worst", failures, 1)
    counted = np.flatnonzero(~np.isnan(result.average_precision))
    sample = np.random.default_rng(seed).permutation(counted)[:SAMPLE]
    findings: dict[str, Any] = {"first_answers": answers.first(sample.tolist())}

    def draw() -> Iterator[Drawn]:
        among = f"of {result.num_valid_queries:,} queries"
        junk = "" if evaluation.camera_free else " Pictures of the query's person by its own camera are left out."
        for kind, words in _KINDS.items():
            subtitle = f"{words} {among}, one a person. AP by the trapezoid rule.{junk}"
            title = f"Ranked lists: {kind} queries"
            yield (
                f"ranked_{kind}",
                sheets.draw_ranked_lists(lists[kind], read_query, read_gallery, title=title, subtitle=subtitle),
            )
        yield "failures", sheets.draw_failures(failed, read_query, read_gallery, subtitle=f"The worst {among}.")
        yield "cmc", curves.draw_result(result)
        if (pairs := result.camera_pairs) is not None:
            yield "camera_pairs", curves.draw_camera_pairs(pairs)
            findings["weakest_camera_pairs"] = curves.weakest_camera_pairs(pairs)
        write_atomically(Path(run_folder) / FIGURES / FINDINGS, json.dumps(findings, indent=1) + "\n")
        if domains:
            yield "domains", sheets.draw_domains(domains, seed=seed)
        if domains and read_copy is not None:
            yield "style_copies", sheets.draw_style_copies(domains[-1], read_copy, seed=seed)
        if drawn := curves.draw_training_curves(merge_steps(read_metrics(Path(run_folder) / METRICS))):
            yield "training", drawn

    return _write(run_folder, draw, writer, step)
