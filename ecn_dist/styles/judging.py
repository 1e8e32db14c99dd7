"""Do the copies show the wanted camera, and still the person? Figures and pictures of them, beside histogram copies'.

n pictures, H x W pixels, C cameras.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ecn_dist.config import Config as TrainConfig
from ecn_dist.data import ShardIndex, SplitIndex
from ecn_dist.data.index import UNKNOWN_PID
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.transforms import normalise_and_erase, resize_into
from ecn_dist.files import write_atomically
from ecn_dist.models import Backbone, normalized_features
from ecn_dist.packing.styles import in_styles, picture_histogram, style_tables
from ecn_dist.reporting.curves import draw_training_curves
from ecn_dist.reporting.montage import Cell, Row, montage, png_of
from ecn_dist.reporting.run_reader import FIGURES, METRICS, merge_steps, read_metrics

MOST_PICTURES, MOST_EMBEDDED = 2000, 400  # that are looked at, and by a re-ID network
PEOPLE, CAMERAS = 5, 8  # of the sheet
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR, TALLEST = 400, 64, 2e-3, 128
REAL, HISTOGRAM, LEARNT = "real", "histogram", "learnt"
Show = Callable[[int, int], Image.Image | None]


@dataclass(frozen=True)
class Looked:
    """Some pictures of a training split, and what shows them in the style of a camera."""

    split: SplitIndex
    rows_n: np.ndarray  # of the split
    shows: Mapping[str, Show]  # by kind: of a row and a camera, its own being the picture itself

    def pictures(self, kind: str) -> tuple[list[Image.Image], np.ndarray]:
        """One of each row, and its cameras: of copies, the other cameras take turns."""
        own_n, num_cameras = self.split.camids[self.rows_n], self.split.num_cameras
        turns_n = 1 + np.arange(len(own_n)) % (num_cameras - 1)
        camids_n = own_n if kind == REAL else (own_n + turns_n) % num_cameras
        shown = map(self.shows[kind], self.rows_n.tolist(), camids_n.tolist())
        return [picture for picture in shown if picture is not None], camids_n


def judge(
    index: ShardIndex, folder: Path, asked: tuple[Backbone, TrainConfig] | None, device: torch.device
) -> dict[str, dict[str, float]]:
    """Figures of what `write_copies` wrote, by kind of picture. For one rank.

    Draws figures/ in `folder`, with the losses of its metrics.jsonl, if any. Returns `camera`: the share of pictures in
    which a small classifier, trained on other real ones, sees the wanted camera (of real pictures, theirs); and where a
    re-ID network is `asked`, with the configuration it was trained with, `original`: the share of copies whose original
    it finds nearest of all.
    """
    looked = look_at(index)
    figures = {"camera": see_cameras(looked, device)}
    if asked is not None:
        figures["original"] = find_originals(looked, *asked, device)
    sheet = draw_sheet(looked, in_words(figures))
    write_atomically(folder / FIGURES / "styles.png", sheet)
    if losses := draw_training_curves(merge_steps(read_metrics(folder / METRICS))):
        write_atomically(folder / FIGURES / "training.png", png_of(losses))
    return figures


def in_words(figures: Mapping[str, Mapping[str, float]]) -> str:
    """What `judge` returns, in percent."""
    said = {"camera": "Shows the wanted camera to a classifier", "original": "leads back to its original"}
    parts = {name: ", ".join(f"{kind} {100 * share:.1f}" for kind, share in of.items()) for name, of in figures.items()}
    return "; ".join(f"{said[name]} (percent): {part}" for name, part in parts.items()) + "."


def look_at(index: ShardIndex, seed: int = 0) -> Looked:
    """At most MOST_PICTURES, drawn by the seed, whose histograms also make the histogram copies."""
    split, reader = index.split("train"), ShardReader()
    camids, pids = split.camids, split.pids
    rows_n = np.random.default_rng(seed).permutation(len(split))[:MOST_PICTURES]
    histograms_CKV = np.zeros((split.num_cameras, 3, 256), dtype=np.int64)
    for row in rows_n.tolist():
        histograms_CKV[camids[row]] += picture_histogram(reader.read_picture(split, row))
    histograms_CKV[histograms_CKV.sum((1, 2)) == 0] = 1  # of a camera that was not drawn: nothing is known
    tables_CCKV = style_tables(histograms_CKV)

    def real(row: int, camid: int) -> Image.Image | None:
        """The picture, or another of the same person by the camera."""
        same = np.flatnonzero((pids == pids[row]) & (camids == camid) & (pids != UNKNOWN_PID))
        rows = [row] if camids[row] == camid else same.tolist()
        return reader.read_picture(split, rows[0]) if rows else None

    def histogram(row: int, camid: int) -> Image.Image:
        return in_styles(reader.read_picture(split, row), tables_CCKV[camids[row]], [camid])[camid]

    def learnt(row: int, camid: int) -> Image.Image:
        return reader.read_picture(split, row, None if camids[row] == camid else camid)

    return Looked(split, rows_n, {REAL: real, HISTOGRAM: histogram, LEARNT: learnt})


def see_cameras(looked: Looked, device: torch.device) -> dict[str, float]:
    """By kind, the share of pictures in which a classifier, trained on the other half of the real ones, is right."""
    shown = {kind: looked.pictures(kind) for kind in looked.shows}
    width, height = shown[LEARNT][0][0].size
    scale, half = min(1.0, TALLEST / height), len(looked.rows_n) // 2
    size = round(height * scale), round(width * scale)
    images = {kind: _normalised(pictures, *size).to(device) for kind, (pictures, _) in shown.items()}
    camids = {kind: torch.from_numpy(camids_n).to(device) for kind, (_, camids_n) in shown.items()}
    classifier = _train_classifier(images[REAL][:half], camids[REAL][:half], looked.split.num_cameras)
    with torch.inference_mode():
        return {kind: _share(classifier(images[kind][half:]).argmax(1) == camids[kind][half:]) for kind in shown}


def find_originals(looked: Looked, backbone: Backbone, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """By kind of copy, the share whose original is the nearest of all originals to a trained network."""
    looked = Looked(looked.split, looked.rows_n[:MOST_EMBEDDED], looked.shows)
    dtype = next(backbone.parameters()).dtype

    @torch.inference_mode()
    def features(kind: str) -> Tensor:
        images = _normalised(looked.pictures(kind)[0], config.data.height, config.data.width).to(device, dtype)
        return torch.cat([normalized_features(backbone, part) for part in images.split(CLASSIFIER_BATCH)])

    originals_nD, own_n = features(REAL), torch.arange(len(looked.rows_n), device=device)
    return {kind: _share((features(kind) @ originals_nD.T).argmax(1) == own_n) for kind in (HISTOGRAM, LEARNT)}


def _share(right_n: Tensor) -> float:
    return right_n.float().mean().item()


def _normalised(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """(n, 3, H, W) float32, as networks of pictures take them."""
    pixels_nHW3 = torch.empty((len(pictures), height, width, 3), dtype=torch.uint8)
    for out_HW3, picture in zip(pixels_nHW3, pictures, strict=True):
        resize_into(out_HW3, np.array(picture))
    return normalise_and_erase(pixels_nHW3)


def _train_classifier(images_n3HW: Tensor, camids_n: Tensor, num_cameras: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_cameras))
    classifier.to(images_n3HW.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=CLASSIFIER_LR)
    draws = np.random.default_rng(seed)
    steps = min(CLASSIFIER_STEPS, max(CLASSIFIER_BATCH, len(camids_n)))  # a few pictures are learnt sooner
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = CLASSIFIER_LR * (1 - step / steps)
        rows_b = torch.from_numpy(draws.integers(len(camids_n), size=CLASSIFIER_BATCH)).to(camids_n.device)
        optimizer.zero_grad()
        F.cross_entropy(classifier(images_n3HW[rows_b]), camids_n[rows_b]).backward()
        optimizer.step()
    return classifier.eval()


def draw_sheet(looked: Looked, words: str = "") -> bytes:
    """A PNG: of some people one picture each, and a line of cameras for each kind; `words` stand in the caption."""
    split, cameras = looked.split, range(min(looked.split.num_cameras, CAMERAS))
    lines, seen = [], {UNKNOWN_PID}
    for turn in range(PEOPLE):
        own = turn % len(cameras)
        of_camera = [row for row in looked.rows_n.tolist() if split.camids[row] == own]
        fresh = [row for row in of_camera if split.pids[row] not in seen] or of_camera[turn:]
        for row in fresh[:1]:
            seen.add(int(split.pids[row]))
            for kind, show in looked.shows.items():
                shown = [show(row, camid) for camid in cameras]
                cells = [Cell(shown[c], "" if shown[c] else "none", "query" if c == own else "") for c in cameras]
                lines.append(Row(f"camera {own}\n{kind}" if kind == REAL else kind, cells))
    subtitle = f"Framed: the original; beside it, the same person as other cameras took it, and its copies. {words}"
    heads = [f"cam {camid}" for camid in cameras]
    return png_of(montage(lines, title="Camera styles", subtitle=subtitle, heads=heads))
