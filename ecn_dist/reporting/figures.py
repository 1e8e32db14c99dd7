"""The figures of a run, and its report."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
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
from ecn_dist.reporting.ranked import Answers, Kind, RankedList, choose_queries
from ecn_dist.reporting.report import FINDINGS, write_report
from ecn_dist.reporting.run_reader import FIGURES, METRICS, merge_steps, read_metrics

QUERIES, TOP, FAILURES = 5, 10, 12  # of a sheet of ranked lists, and how long these are; of the sheet of failures
SAMPLE = 500  # queries whose first answers are looked at
Drawn = tuple[str, Figure]  # with the name of its file
Writer = SummaryWriter | None
_KINDS: dict[Kind, str] = {"best": "The highest AP", "worst": "The lowest AP", "random": "Any"}


def _write(run_folder: Path, draw: Callable[[], Iterable[Drawn]], writer: Writer, step: int) -> None:
    """Let rank 0 draw, into figures/ and for TensorBoard; an error of it is raised on all ranks. Collective."""
    folder = run_folder / FIGURES

    def write() -> None:
        for name, figure in draw() if distributed.is_main() else ():
            path = write_atomically(folder / f"{name}.png", png_of(figure))
            if writer is not None:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")

    distributed.together(write, f"the figures in {folder}")


def write_cluster_figures(
    run_folder: Path, train: SplitIndex, labels: np.ndarray, *, writer: Writer = None, step: int = 0
) -> None:
    """Draw some of the clusters of `train`, usually the target's, into RUN/figures/clusters.png.

    `labels` (n,) has the clusters by exemplar index, as `Method.labels` gives them: below 0 for an outlier. The report
    is written by `write_figures`, or again. Raises `UserError`, on all ranks, for a picture that cannot be read.
    Collective; rank 0 draws.
    """
    domain, labels = _domain("target", train, ShardReader()), labels[train.indices]
    _write(run_folder, lambda: [("clusters", sheets.draw_clusters(labels, domain))], writer, step)


def _domain(name: str, split: SplitIndex, reader: ShardReader) -> sheets.Domain:
    return sheets.Domain(name, split.camids, partial(reader.read_picture, split), split.pids)


def write_figures(
    run_folder: Path, evaluation: Evaluation, indices: Mapping[str, ShardIndex], *, writer: Writer = None, step: int = 0
) -> None:
    """Draw the figures of a run and its result into RUN/figures/, and write report.html.

    Args:
        run_folder: its metrics.jsonl gives the training curves.
        evaluation: of plain distances, neither re-ranked nor with expanded queries.
        indices: the shard folder "target", which was evaluated, and perhaps "source".
        writer, step: TensorBoard's SummaryWriter gets the same pixels.

    Also writes figures/findings.json, which the report reads: where the ranking fails. Raises `UserError`, on all
    ranks, for a picture that cannot be read. Collective; rank 0 draws.
    """
    result, answers, reader = evaluation.result, Answers(evaluation), ShardReader()
    train, query, gallery = (indices["target"].split(name) for name in ("train", "query", "gallery"))
    read_query, read_gallery = partial(reader.read_picture, query), partial(reader.read_picture, gallery)

    def lists_of(kind: Kind, count: int, top: int) -> list[RankedList]:
        return answers.lists(choose_queries(result.average_precision, answers.pids_Q, count, kind), top)

    lists = {kind: lists_of(kind, QUERIES, TOP) for kind in _KINDS}
    failed = lists_of("worst", FAILURES, 1)
    counted = np.flatnonzero(~np.isnan(result.average_precision))
    sample = np.random.default_rng(0).permutation(counted)[:SAMPLE]
    findings: dict[str, Any] = {"first_answers": answers.first(sample.tolist())}

    def draw() -> Iterator[Drawn]:
        among = f"of {result.num_valid_queries:,} queries"
        junk = "" if evaluation.camera_free else " Pictures of the query's person by its own camera are left out."
        for kind, words in _KINDS.items():
            about = f"{words} {among}, one a person. AP by the trapezoid rule.{junk}"
            title = f"Ranked lists: {kind} queries"
            yield f"ranked_{kind}", sheets.draw_ranked_lists(lists[kind], read_query, read_gallery, title, about)
        yield "failures", sheets.draw_failures(failed, read_query, read_gallery, f"The worst {among}.")
        yield "cmc", curves.draw_result(result)
        if (pairs := result.camera_pairs) is not None:
            yield "camera_pairs", curves.draw_camera_pairs(pairs)
            findings["weakest_camera_pairs"] = curves.weakest_camera_pairs(pairs)
        write_atomically(run_folder / FIGURES / FINDINGS, json.dumps(findings, indent=1) + "\n")
        domains = [_domain(name, indices[name].split("train"), reader) for name in sorted(indices)]
        yield "domains", sheets.draw_domains(domains)
        if train.has_styles:
            yield "style_copies", sheets.draw_style_copies(domains[-1], partial(reader.read_picture, train))
        if drawn := curves.draw_training_curves(merge_steps(read_metrics(run_folder / METRICS))):
            yield "training", drawn

    _write(run_folder, draw, writer, step)
    distributed.together(lambda: write_report(run_folder) if distributed.is_main() else None, "the report")
