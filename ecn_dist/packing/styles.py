"""Where the style copies of a training split come from: the data set ships them, or its histograms make them.

A camera changes colours mostly by its gains, gamma and white balance, which act on each channel alone. The monotone
curve that takes the distribution of a channel's values at one camera to that at another undoes and redoes them. It is
one curve for a pair of cameras, measured over all their training pictures, so a picture keeps what is its own.

C cameras, K = 3 channels, V = 256 values.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from ecn_dist.data.pictures import UnreadablePicture, decode, read_file
from ecn_dist.errors import UserError
from ecn_dist.packing.layouts import files_below
from ecn_dist.packing.records import Dataset, Record, first_few, refuse_unreadable
from ecn_dist.processes import choose_workers, run_jobs

KINDS = ("auto", "shipped", "histogram", "none")
PICTURES_PER_JOB = 512
CHANNELS, VALUES = 3, 256


@dataclass(frozen=True)
class Styles:
    """The training split's style copies."""

    kind: str  # shipped, histogram or none
    copies: Mapping[str, Mapping[int, str]] = field(default_factory=dict)  # shipped: paths by file name and camid
    tables_CCKV: np.ndarray | None = None  # histogram: see `style_tables`
    missing: int | None = None  # copies that there are not; None where there is no training split
    unused: int = 0  # shipped files that are no training picture's copy


def find_styles(dataset: Dataset, kind: str, *, allow_missing: bool = False, workers: int | None = None) -> Styles:
    """What `kind`, one of KINDS, means for this data set; auto: shipped copies if there are any, else histogram.

    Raises `UserError` for no or too few shipped copies (`allow_missing` accepts that some are missing), and for a
    camera without a histogram.
    """
    if "train" not in dataset.splits:
        return Styles("none")
    if kind == "auto":
        kind = "shipped" if dataset.styles_folder else "histogram"
    wanted = len(dataset.splits["train"]) * (len(dataset.cameras) - 1)
    if kind == "none" or wanted == 0:
        return Styles("none", missing=wanted)
    if kind == "shipped":
        return _shipped(dataset, wanted, allow_missing)
    return Styles("histogram", tables_CCKV=style_tables(_histograms(dataset, workers)), missing=0)


def _shipped(dataset: Dataset, wanted: int, allow_missing: bool) -> Styles:
    """Copies by file name: STEM_fake_1to2 (Market-1501, DukeMTMC-reID) or STEM_fake_2 (MSMT17)."""
    if dataset.styles_folder is None:
        raise UserError(
            f"{dataset.root} has no folder of style copies; name --styles_folder, or --camera_style histogram or none"
        )
    folder = dataset.styles_folder
    names = [name for name in map(PurePosixPath, files_below(folder)[0]) if not name.name.startswith(".")]
    files = {str(name.with_suffix("")): str(folder / name) for name in names}
    copies: dict[str, dict[int, str]] = {}
    missing: list[str] = []
    for record in dataset.splits["train"]:
        file = PurePosixPath(record.file)
        stem = str(file.with_suffix("")) if dataset.layout == "folder" else file.stem
        copies[record.file] = {}
        for camera, camid in dataset.camids.items():
            if camera == record.camera:
                continue
            choice = (f"{stem}_fake_{record.camera}to{camera}", f"{stem}_fake_{camera}")
            if there := [files[name] for name in choice if name in files]:
                copies[record.file][camid] = there[0]
            else:
                missing.append(choice[0])
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {wanted} style copies are missing in {folder}: {first_few(missing)}. "
            "Complete them, accept that with --allow_missing_styles, or make all copies with --camera_style histogram"
        )
    return Styles("shipped", copies=copies, missing=len(missing), unused=len(files) - (wanted - len(missing)))


def _histograms(dataset: Dataset, workers: int | None) -> np.ndarray:
    """(C, K, V) int64: the counts of all training pictures of each camera."""
    records = dataset.splits["train"]
    jobs = [records[first : first + PICTURES_PER_JOB] for first in range(0, len(records), PICTURES_PER_JOB)]
    chosen = choose_workers(workers, len(records))
    results = run_jobs(partial(_chunk_histograms, dataset.camids), jobs, chosen, "camera histograms")
    refuse_unreadable([name for _, names in results for name in names])
    histograms_CKV = np.sum([histograms for histograms, _ in results], axis=0)
    if empty := [camera for camera, camid in dataset.camids.items() if not histograms_CKV[camid].any()]:
        raise UserError(
            f"no training picture of {dataset.root} comes from camera {first_few(empty)}, which has pictures in other "
            "splits, so its style cannot be measured. Add training pictures of it, or use --camera_style none"
        )
    return histograms_CKV


def _chunk_histograms(camids: Mapping[str, int], records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    histograms_CKV = np.zeros((len(camids), CHANNELS, VALUES), dtype=np.int64)
    unreadable: list[str] = []
    for record in records:
        try:
            histograms_CKV[camids[record.camera]] += picture_histogram(decode(read_file(record.path)))
        except (OSError, UnreadablePicture) as error:
            unreadable.append(f"{record.path} ({error})")
    return histograms_CKV, unreadable


def picture_histogram(image: Image.Image) -> np.ndarray:
    """(K, V) int64 counts of an RGB picture's values."""
    return np.asarray(image.histogram(), dtype=np.int64).reshape(CHANNELS, VALUES)


def style_tables(histograms_CKV: np.ndarray) -> np.ndarray:
    """(C, C, K, V) uint8: entry [c, d] takes values of camera c to the style of camera d. [c, c] changes nothing.

    Value v of camera c, at quantile q of that camera's values (that of the middle of its pixels), becomes the value at
    quantile q of camera d, linearly interpolated. Never decreasing in v.
    """
    cameras = range(len(histograms_CKV))
    tables_CCKV = np.empty((len(cameras), len(cameras), CHANNELS, VALUES), dtype=np.uint8)
    quantiles_CKV = (histograms_CKV.cumsum(-1) - histograms_CKV / 2) / histograms_CKV.sum(-1, keepdims=True)
    for d, k in product(cameras, range(CHANNELS)):
        (values,) = histograms_CKV[d, k].nonzero()
        tables_CCKV[:, d, k] = np.interp(quantiles_CKV[:, k], quantiles_CKV[d, k, values], values).round()
    tables_CCKV[cameras, cameras] = np.arange(VALUES)
    return tables_CCKV


def in_styles(image: Image.Image, tables_CKV: np.ndarray, camids: Iterable[int]) -> dict[int, Image.Image]:
    """An RGB picture in the style of each of `camids`; `tables_CKV` is `style_tables(...)[c]` for the camera c."""
    return {camid: image.point(tables_CKV[camid].ravel().tolist()) for camid in camids}
