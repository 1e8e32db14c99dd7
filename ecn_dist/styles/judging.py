"""Do the copies show the wanted camera, and still the person? Figures and pictures of them, beside histogram copies'.

n pictures, H x W pixels, C cameras.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ecn_dist.config import Config as TrainConfig
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.transforms import normalise_and_erase, resize_into
from ecn_dist.files import write_atomically
from ecn_dist.models import Backbone, normalized_features
from ecn_dist.packing.styles import in_styles, picture_histogram, style_tables
from ecn_dist.reporting.curves import draw_training_curves
from ecn_dist.reporting.montage import Cell, Row, montage, pixels_of, png_of
from ecn_dist.reporting.run_reader import FIGURES, METRICS, merge_steps, read_metrics

MOST_PICTURES, MOST_EMBEDDED = 2000, 400  # that are looked at, and by a re-ID network
PEOPLE, CAMERAS = 5, 8  # of the sheet
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_SIZE = 400, 64, (128, 64)
REAL, HISTOGRAM, LEARNT = "real", "histogram", "learnt"
Pictures = Sequence[Image.Image]
Copies = Callable[[int, int], Image.Image]  # row, camera


@dataclass(frozen=True)
class Judged:
    """Some pictures of a training split, their histogram and learnt copies."""

    split: SplitIndex
    rows: np.ndarray  # of the split
    copies: Mapping[str, Copies]
    read: Callable[[int], Image.Image]

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """Row and camera of one copy of each: the cameras take turns."""
        num_cameras, camids = self.split.num_cameras, self.split.camids
        return [(row, int(camids[row] + 1 + at % (num_cameras - 1)) % num_cameras) for at, row in enumerate(self.rows)]


def look_at(index: ShardIndex, seed: int = 0) -> Judged:
    """What is judged of a shard folder with learnt copies: at most MOST_PICTURES, drawn by the seed."""
    split, reader = index.split("train"), ShardReader()
    rows = np.random.default_rng(seed).permutation(len(split))[:MOST_PICTURES]

    def read(row: int) -> Image.Image:
        return reader.read_picture(split, row)

    histograms_CKV = np.zeros((split.num_cameras, 3, 256), dtype=np.int64)
    for row in rows.tolist():
        histograms_CKV[split.camids[row]] += picture_histogram(read(row))
    tables_CCKV = style_tables(np.maximum(histograms_CKV, histograms_CKV.sum((1, 2), keepdims=True) == 0))

    def by_histogram(row: int, camid: int) -> Image.Image:
        return in_styles(read(row), tables_CCKV[split.camids[row]], [camid])[camid]

    learnt = lambda row, camid: reader.read_picture(split, row, camid)  # noqa: E731
    return Judged(split, rows, {HISTOGRAM: by_histogram, LEARNT: learnt}, read)


def judge(
    index: ShardIndex, folder: Path, asked: tuple[Backbone, TrainConfig] | None, device: torch.device
) -> dict[str, dict[str, float]]:
    """Figures of a shard folder with learnt copies, by kind of picture; draws figures/ in `folder`. For one rank.

    Args:
        index: what `write_copies` wrote.
        folder: its metrics.jsonl, if any, gives the losses.
        asked: a re-ID network and the configuration it was trained with, for the figure "original".
        device: where to compute.
    """
    judged = look_at(index)
    figures = {"camera": see_cameras(judged, device)}
    if asked is not None:
        figures["original"] = find_originals(judged, *asked, device)
    write_figures(folder, draw_sheet(judged, in_words(figures)))
    return figures


def see_cameras(judged: Judged, device: torch.device) -> dict[str, float]:
    """The share of pictures in which a small classifier of cameras, trained on other pictures, sees the right one."""
    half = len(judged.rows) // 2
    height, width = (min(most, side) for most, side in zip(CLASSIFIER_SIZE, _size(judged), strict=True))
    load = lambda pictures: _normalised(pictures, height, width).to(device)  # noqa: E731
    camids_n = torch.from_numpy(judged.split.camids[judged.rows]).to(device)
    classifier = _train_classifier(
        load(map(judged.read, judged.rows[:half])), camids_n[:half], judged.split.num_cameras
    )

    def share(pictures: Pictures, wanted: Tensor) -> float:
        with torch.inference_mode():
            return (classifier(load(pictures)).argmax(1) == wanted).float().mean().item()

    found = {REAL: share([judged.read(row) for row in judged.rows[half:]], camids_n[half:])}
    asked = judged.wanted[half:]
    for kind, copy in judged.copies.items():
        found[kind] = share([copy(*of) for of in asked], torch.tensor([camid for _, camid in asked], device=device))
    return found


def find_originals(judged: Judged, backbone: Backbone, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """The share of copies whose original is the nearest of all originals to a trained network."""
    dtype = next(backbone.parameters()).dtype
    judged = replace(judged, rows=judged.rows[:MOST_EMBEDDED])

    @torch.inference_mode()
    def features(pictures: Pictures) -> Tensor:
        images = _normalised(pictures, config.data.height, config.data.width).to(device, dtype)
        return torch.cat([normalized_features(backbone, part) for part in images.split(128)])

    originals_nD = features([judged.read(row) for row in judged.rows])
    own_n, found = torch.arange(len(judged.rows), device=device), {}
    for kind, copy in judged.copies.items():
        nearest_n = (features([copy(*of) for of in judged.wanted]) @ originals_nD.T).argmax(1)
        found[kind] = (nearest_n == own_n).float().mean().item()
    return found


def _size(judged: Judged) -> tuple[int, int]:
    width, height = judged.copies[LEARNT](*judged.wanted[0]).size
    return height, width


def _normalised(pictures: Pictures, height: int, width: int) -> Tensor:
    """(n, 3, H, W) float32, as networks of pictures take them."""
    pictures = list(pictures)
    pixels_nHW3 = torch.empty((len(pictures), height, width, 3), dtype=torch.uint8)
    for out_HW3, picture in zip(pixels_nHW3, pictures, strict=True):
        resize_into(out_HW3, np.array(picture))
    return normalise_and_erase(pixels_nHW3)


def _train_classifier(images_n3HW: Tensor, camids_n: Tensor, num_cameras: int, seed: int = 0) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    torch.manual_seed(seed)
    classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_cameras))
    classifier.to(images_n3HW.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    draws = np.random.default_rng(seed)
    for step in range(CLASSIFIER_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / CLASSIFIER_STEPS)
        rows = torch.from_numpy(draws.integers(len(images_n3HW), size=CLASSIFIER_BATCH)).to(images_n3HW.device)
        images = images_n3HW[rows]
        logits = classifier(images.flip(3) if draws.random() < 0.5 else images)
        optimizer.zero_grad()
        F.cross_entropy(logits, camids_n[rows]).backward()
        optimizer.step()
    return classifier.eval()


def draw_sheet(judged: Judged, words: str = "") -> bytes:
    """A PNG: of some people, one original each, three lines of cameras: real pictures, histogram and learnt copies.

    `words` stand in its caption.
    """
    split, cameras = judged.split, range(min(judged.split.num_cameras, CAMERAS))
    lines, seen = [], set()
    for turn in range(PEOPLE):
        camid = turn % len(cameras)
        fresh = [row for row in judged.rows.tolist() if split.camids[row] == camid and split.pids[row] not in seen]
        for row in fresh[:1]:
            seen |= {int(split.pids[row])} - {-1}
            own = Cell(judged.read(row), "", "query")
            same = {int(split.camids[at]): int(at) for at in np.flatnonzero(split.pids == split.pids[row])}
            known = same if split.pids[row] >= 0 else {}
            reals = [Cell(judged.read(known[other])) if other in known else Cell(words="none") for other in cameras]
            reals[camid] = own
            lines.append(Row(f"camera {camid}\n{REAL}", reals))
            for kind, copy in judged.copies.items():
                cells = [own if other == camid else Cell(copy(row, other)) for other in cameras]
                lines.append(Row(kind, cells))
    caption = "Framed: the original. Below real pictures of the person, its copies in the other cameras' styles. "
    title = "Camera styles"
    caption += words
    sheet = montage(lines, title=title, subtitle=caption, heads=[f"cam {camid}" for camid in cameras])
    return png_of(pixels_of(sheet), title=title, caption=caption)


def write_figures(run_folder: Path, sheet: bytes) -> None:
    """Write figures/styles.png and, of the losses, figures/training.png, which `report` shows too."""
    write_atomically(run_folder / FIGURES / "styles.png", sheet)
    if rows := merge_steps(read_metrics(run_folder / METRICS)):
        losses = png_of(pixels_of(draw_training_curves(rows)), title="Training", caption="From metrics.jsonl.")
        write_atomically(run_folder / FIGURES / "training.png", losses)


def in_words(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of `see_cameras` ("camera") and `find_originals` ("original") in a sentence each, in percent."""
    said = {
        "camera": "a small classifier of cameras sees the right or wanted camera in",
        "original": "the re-ID network finds the original nearest to",
    }
    parts = {
        name: ", ".join(f"{100 * share:.1f} of {kind}" for kind, share in figures[name].items()) for name in figures
    }
    return " ".join(f"Of 100, {said[name]} {part} pictures." for name, part in parts.items())
