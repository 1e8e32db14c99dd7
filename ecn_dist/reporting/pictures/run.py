"""All figures of a run, by one call."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure

from ecn_dist import distributed
from ecn_dist.ranking.features import FeatureSet
from ecn_dist.ranking.ranking import CameraPairs, RankingResult
from ecn_dist.reporting.pictures.cameras import draw_camera_pairs, weakest_camera_pairs
from ecn_dist.reporting.pictures.canvas import pixels_of, save_pixels
from ecn_dist.reporting.pictures.curves import draw_cmc, draw_precision_recall, draw_training_curves
from ecn_dist.reporting.pictures.failures import FirstAnswers, draw_failures, first_answers
from ecn_dist.reporting.pictures.ranked import RankedList, ReadPicture, choose_queries, draw_ranked_lists, ranked_lists
from ecn_dist.reporting.pictures.sheets import Domain, ReadCopy, draw_domains, draw_style_copies
from ecn_dist.reporting.run_reader import FIGURES, METRICS, read_metrics

FINDINGS = "findings.json"
WORK_BUDGET = 2 * 10**10  # multiplications to find what comes first for a sample of queries: 20 s of a core at most


class ImageWriter(Protocol):
    """What is asked of TensorBoard's SummaryWriter."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str = "CHW") -> Any:
        """Record one picture."""


class FigureFolder:
    """Where a run's figures go: PNGs in its figures/, and TensorBoard where a writer is given."""

    def __init__(self, run_folder: str | Path, writer: ImageWriter | None = None, step: int | None = None) -> None:
        self.path = Path(run_folder) / FIGURES
        self.written: list[Path] = []
        self._writer, self._step = writer, step

    def add(self, name: str, figure: Figure, *, title: str, caption: str) -> None:
        """Save `figure` as NAME.png and hand the same pixels to the writer."""
        pixels = pixels_of(figure)
        self.written.append(save_pixels(pixels, self.path / f"{name}.png", title=title, caption=caption))
        if self._writer is not None:
            self._writer.add_image(f"figures/{name}", pixels, self._step, dataformats="HWC")


def write_run_figures(
    run_folder: str | Path,
    result: RankingResult,
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    read_query: ReadPicture,
    read_gallery: ReadPicture,
    domains: Sequence[Domain] = (),
    read_copy: ReadCopy | None = None,
    camera_free: bool = False,
    gallery_sharded: bool = False,
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
        result: of `evaluate_ranking` on the same features; with `camera_pairs=True` there is a heat map too.
        query, gallery: features (Q, D) and (G, D), pids, camids, in the order that `read_query(row)` and
            `read_gallery(row)` count in.
        domains, read_copy: the training pictures of each domain, and the style copies of the last of them.
        camera_free: the pictures have no cameras: nothing is junk, and no camera is written.
        gallery_sharded: `gallery` is this rank's part, in rank order. All ranks must call, with the same queries; rank
            0 alone draws, reads pictures and returns paths. Otherwise one rank calls, and no collective is used.
        queries, failures, top: how many queries a sheet of ranked lists and the sheet of failures show, and how long a
            list is; `seed` chooses among equals, and the random ones.
        writer, step: TensorBoard's SummaryWriter gets the same pixels.

    Also writes figures/findings.json, which the report reads: numbers on where the ranking fails. Raises `UserError`
    for a picture that cannot be read; on all ranks, where the gallery is sharded.
    """
    cameras = (None, None) if camera_free else (query.camids, gallery.camids)
    labels = (query.features, query.pids, cameras[0], gallery.features, gallery.pids, cameras[1])
    precision_Q, pids_Q = result.average_precision, query.pids.cpu()

    def lists_of(chosen: Sequence[int], length: int) -> list[RankedList]:
        return ranked_lists(*labels, chosen, top=length, gallery_sharded=gallery_sharded)

    lists = {kind: lists_of(choose_queries(precision_Q, pids_Q, queries, kind, seed), top) for kind in _KINDS}
    failed = lists_of(choose_queries(precision_Q, pids_Q, failures, "worst", seed), 1)
    sample = lists_of(_sample(len(pids_Q), gallery, seed, gallery_sharded), 1)
    answers = first_answers(sample, query.pids, gallery.pids, cameras[1], gallery_sharded=gallery_sharded)
    folder = FigureFolder(run_folder, writer, step)

    def draw() -> None:
        """What rank 0 does alone; no collective."""
        among = f"of {result.num_valid_queries:,} queries"
        for kind, words in _KINDS.items():
            title = f"Ranked lists: {kind} queries"
            caption = f"{words} {among}, one a person. AP is by the trapezoid rule."
            if not camera_free:
                caption += " Pictures of the same person by the same camera are left out."
            figure = draw_ranked_lists(
                lists[kind], read_query, read_gallery, title=title, subtitle=caption, average_precision_Q=precision_Q
            )
            folder.add(f"ranked_{kind}", figure, title=title, caption=caption)
        caption = f"Worst {among}: the query, what came first instead, and the best placed true match."
        figure = draw_failures(failed, read_query, read_gallery, subtitle=caption, average_precision_Q=precision_Q)
        folder.add("failures", figure, title="Failures", caption=caption)
        caption = f"The share {among} that have a true match among the first k gallery pictures."
        folder.add("cmc", draw_cmc({"": result.cmc}), title="Cumulative matching (CMC)", caption=caption)
        caption = f"Mean {among}: the highest precision at each recall or beyond."
        figure = draw_precision_recall({"": (result.recall_levels, result.precision_at_recall)})
        folder.add("precision_recall", figure, title="Precision and recall", caption=caption)
        if result.camera_pairs is not None:
            _add_camera_pairs(folder, result.camera_pairs)
        _write_findings(folder.path, answers, result.camera_pairs)
        if domains:
            write_data_figures(folder, domains, read_copy, seed=seed)
        write_training_figure(folder, run_folder)

    if gallery_sharded:
        distributed.together(lambda: draw() if distributed.is_main() else None, f"the figures in {folder.path}")
    else:
        draw()
    return folder.written


def write_data_figures(
    folder: FigureFolder, domains: Sequence[Domain], read_copy: ReadCopy | None = None, *, seed: int = 0
) -> None:
    """The sheet of the domains by camera, and that of the last domain's style copies where `read_copy` is given."""
    people = all(domain.known_pids is not None for domain in domains)
    caption = "Training pictures. A line is a camera" + (", a column one person." if people else ".")
    folder.add("domains", draw_domains(domains, seed=seed), title="The domains by camera", caption=caption)
    if read_copy is not None:
        caption = f"Pictures of {domains[-1].name}, each with its copies in the style of the other cameras."
        figure = draw_style_copies(domains[-1], read_copy, seed=seed)
        folder.add("style_copies", figure, title="Style copies", caption=caption)


def write_training_figure(folder: FigureFolder, run_folder: str | Path) -> None:
    """Losses, learning rates and speed from the run's metrics.jsonl; nothing where no step was logged."""
    rows = read_metrics(Path(run_folder) / METRICS)
    if rows:
        caption = "From metrics.jsonl. Long curves are shown as the mean and the range of equal parts."
        folder.add("training", draw_training_curves(rows), title="Training", caption=caption)


_KINDS: dict[Literal["best", "worst", "random"], str] = {
    "best": "The highest AP",
    "worst": "The lowest AP",
    "random": "Any",
}


def _sample(num_queries: int, gallery: FeatureSet, seed: int, gallery_sharded: bool) -> list[int]:
    """As many queries as WORK_BUDGET allows, in ascending order; the same on every rank."""
    rows = torch.tensor(len(gallery.pids))
    rows = distributed.all_reduce(rows) if gallery_sharded else rows
    affordable = max(WORK_BUDGET // max(int(rows) * gallery.features.shape[1], 1), 50)
    if affordable >= num_queries:
        return list(range(num_queries))
    return sorted(np.random.default_rng(seed).choice(num_queries, affordable, replace=False).tolist())


def _add_camera_pairs(folder: FigureFolder, pairs: CameraPairs) -> None:
    caption = "Row: the query's camera; column: the camera of the gallery it is ranked against. By the trapezoid rule."
    for weakest in weakest_camera_pairs(pairs.mAP, pairs.num_valid_queries, pairs.camids.tolist(), count=1):
        between = f"camera {weakest.query_camera} against camera {weakest.gallery_camera}"
        caption += f" Weakest: {between}, {100 * weakest.value:.1f} percent."
    figure = draw_camera_pairs(pairs.mAP, pairs.num_valid_queries, cameras=pairs.camids.tolist())
    folder.add("camera_pairs", figure, title="mAP by camera pair", caption=caption)


def _write_findings(folder: Path, answers: FirstAnswers, pairs: CameraPairs | None) -> None:
    found: dict[str, Any] = {"first_answers": asdict(answers)}
    if pairs is not None:
        weakest = weakest_camera_pairs(pairs.mAP, pairs.num_valid_queries, pairs.camids.tolist())
        found["weakest_camera_pairs"] = {"measure": "mAP", "pairs": [pair._asdict() for pair in weakest]}
    (folder / FINDINGS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
