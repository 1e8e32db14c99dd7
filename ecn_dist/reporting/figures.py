"""All figures of a run, by one call, and its report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist import distributed
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.files import write_atomically
from ecn_dist.ranking.evaluating import Evaluation
from ecn_dist.reporting import curves, sheets
from ecn_dist.reporting.montage import pixels_of, png_of
from ecn_dist.reporting.ranked import Answers, Kind, choose_queries
from ecn_dist.reporting.report import FINDINGS, TRAINING, write_report
from ecn_dist.reporting.run_reader import FIGURES, METRICS, merge_steps, read_metrics
from ecn_dist.reporting.sheets import Domain, ReadCopy, ReadPicture

SAMPLE = 500  # queries whose first answers are looked at
Drawn = tuple[str, Figure, str, str]  # name of the file, figure, title, caption
_KINDS: dict[Kind, str] = {"best": "The highest AP", "worst": "The lowest AP", "random": "Any"}


class ImageWriter(Protocol):
    """What is asked of TensorBoard's SummaryWriter."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str = "CHW") -> Any:
        """Record one picture."""


def _write(run_folder: str | Path, drawn: Iterator[Drawn], writer: ImageWriter | None, step: int | None) -> list[Path]:
    """Let rank 0 draw, into figures/ and for TensorBoard; an error of it is raised on all ranks. Collective."""
    folder, written = Path(run_folder) / FIGURES, []

    def write() -> None:
        for name, figure, title, caption in drawn if distributed.is_main() else ():
            pixels = pixels_of(figure)
            written.append(write_atomically(folder / f"{name}.png", png_of(pixels, title=title, caption=caption)))
            if writer is not None:
                writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")

    distributed.together(write, f"the figures in {folder}")
    return written


def write_figures(
    run_folder: Path,
    evaluation: Evaluation,
    indices: Mapping[str, ShardIndex],
    *,
    writer: ImageWriter | None = None,
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
    writer: ImageWriter | None = None,
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

    def draw() -> Iterator[Drawn]:
        sheet = sheets.draw_clusters(labels, domain.pids, domain.camids, domain.read)
        mixed = "of the most people" if domain.known_pids is not None else "across the most cameras"
        caption = f"The largest, the smallest and those mixed {mixed}, with some of their pictures, as last clustered."
        yield "clusters", sheet, "Clusters", caption

    return _write(run_folder, draw(), writer, step)


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
    writer: ImageWriter | None = None,
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
        junk = "" if evaluation.camera_free else " Pictures of the same person by the same camera are left out."
        for kind, words in _KINDS.items():
            title, caption = f"Ranked lists: {kind} queries", f"{words} {among}, one a person.{junk}"
            sheet = sheets.draw_ranked_lists(lists[kind], read_query, read_gallery, title=title, subtitle=caption)
            yield f"ranked_{kind}", sheet, title, f"{caption} AP is by the trapezoid rule."
        caption = f"Worst {among}: the query, what came first instead, and the best placed true match."
        sheet = sheets.draw_failures(failed, read_query, read_gallery, subtitle=caption)
        yield "failures", sheet, "Failures", caption
        caption = f"The share {among} with a true match among the first k; mean of their highest precision at a recall."
        yield "cmc", curves.draw_result(result), "Cumulative matching, and precision and recall", caption
        if (pairs := result.camera_pairs) is not None:
            caption = "Row: the query's camera; column: the camera of the gallery. By the trapezoid rule."
            yield "camera_pairs", curves.draw_camera_pairs(pairs), "mAP by camera pair", caption
            findings["weakest_camera_pairs"] = curves.weakest_camera_pairs(pairs)
        write_atomically(Path(run_folder) / FIGURES / FINDINGS, json.dumps(findings, indent=1) + "\n")
        if domains:
            yield "domains", sheets.draw_domains(domains, seed=seed), "The domains by camera", "Training pictures."
        if domains and read_copy is not None:
            caption = f"Pictures of {domains[-1].name}, each with its copies in the style of the other cameras."
            sheet = sheets.draw_style_copies(domains[-1], read_copy, seed=seed)
            yield "style_copies", sheet, "Style copies", caption
        if rows := merge_steps(read_metrics(Path(run_folder) / METRICS)):
            yield "training", curves.draw_training_curves(rows), *TRAINING

    return _write(run_folder, draw(), writer, step)
