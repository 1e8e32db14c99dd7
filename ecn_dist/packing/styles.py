"""Where the style copies of a training split come from: the data set ships them, or its histograms make them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ecn_dist.data.jpeg import UnreadablePicture, decode
from ecn_dist.errors import UserError
from ecn_dist.packing.camera_style import CHANNELS, VALUES, picture_histogram, style_tables
from ecn_dist.packing.records import Dataset, Record, first_few
from ecn_dist.packing.work import Advance, Task, choose_workers, run_jobs, silent

KINDS = ("auto", "shipped", "histogram", "none")
PICTURES_PER_JOB = 512


@dataclass(frozen=True)
class Styles:
    """The training split's style copies. C cameras, K channels, V values."""

    kind: str  # shipped, histogram or none
    copies: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)  # shipped: paths by file name, by camid
    tables_CCKV: np.ndarray | None = None  # histogram: see `ecn_dist.packing.camera_style.style_tables`
    missing: int | None = None  # copies that there are not; None where there is no training split
    unused: int = 0  # shipped files that are no training picture's copy

    def pictures(self, dataset: Dataset) -> int:
        """How many pictures the data set has with its style copies."""
        count = sum(map(len, dataset.splits.values()))
        if self.kind != "none":
            count += len(dataset.splits["train"]) * (len(dataset.cameras) - 1) - (self.missing or 0)
        return count


def find_styles(
    dataset: Dataset,
    kind: str,
    *,
    allow_missing: bool = False,
    workers: int | None = None,
    task: Task = silent,
) -> Styles:
    """What `kind` means for this data set.

    Args:
        kind: `shipped`, `histogram`, `none`, or `auto`: shipped copies if there are any, else histogram.
        allow_missing: accept shipped copies of which some are missing.

    Raises:
        UserError: no or too few shipped copies, or a camera without a histogram.
    """
    if kind not in KINDS:
        raise UserError(f"no such camera style: {kind!r}; there are {', '.join(KINDS)}")
    if "train" not in dataset.splits:
        return Styles("none")
    if kind == "auto":
        kind = "shipped" if dataset.styles_folder else "histogram"
    wanted = len(dataset.splits["train"]) * (len(dataset.cameras) - 1)
    if kind == "none" or wanted == 0:
        return Styles("none", missing=wanted)
    if kind == "shipped":
        return _shipped(dataset, wanted, allow_missing)
    advance = task("camera histograms", len(dataset.splits["train"]))
    return Styles("histogram", tables_CCKV=style_tables(_histograms(dataset, workers, advance)), missing=0)


def _shipped(dataset: Dataset, wanted: int, allow_missing: bool) -> Styles:
    """Copies by file name: STEM_fake_1to2 (Market-1501, DukeMTMC-reID) or STEM_fake_2 (MSMT17)."""
    if dataset.styles_folder is None:
        raise UserError(
            f"{dataset.root} has no folder of style copies. Name it with --styles_folder, make copies with "
            "--camera_style histogram, or do without with --camera_style none"
        )
    files = _files_by_stem(dataset.styles_folder)
    copies: dict[str, tuple[str | None, ...]] = {}
    missing: list[str] = []
    used = 0
    for record in dataset.splits["train"]:
        file = PurePosixPath(record.file)
        stem = str(file.with_suffix("")) if dataset.layout == "folder" else file.stem
        paths: list[str | None] = []
        for camera in dataset.cameras:
            names = (f"{stem}_fake_{record.camera}to{camera}", f"{stem}_fake_{camera}")
            path = next((files[name] for name in names if name in files), None) if camera != record.camera else None
            if path is not None:
                used += 1
            elif camera != record.camera:
                missing.append(names[0])
            paths.append(path)
        copies[record.file] = tuple(paths)
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {wanted} style copies are missing in {dataset.styles_folder}: {first_few(missing)}. "
            "Complete them, accept that with --allow_missing_styles, or make all copies with --camera_style histogram"
        )
    return Styles("shipped", copies=copies, missing=len(missing), unused=len(files) - used)


def _files_by_stem(root: Path) -> dict[str, str]:
    """Paths of all files below `root` by their path relative to it, without suffix and with /."""
    return {
        Path(folder, name).relative_to(root).with_suffix("").as_posix(): os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if not name.startswith(".")
    }


def _histograms(dataset: Dataset, workers: int | None, advance: Advance) -> np.ndarray:
    """(C, K, V) int64: the counts of all training pictures of each camera."""
    records = dataset.splits["train"]
    jobs = [
        (records[first : first + PICTURES_PER_JOB], dict(dataset.camids))
        for first in range(0, len(records), PICTURES_PER_JOB)
    ]
    results = run_jobs(_chunk_histograms, jobs, choose_workers(workers, len(records)), advance)
    if unreadable := [name for _, names in results for name in names]:
        raise UserError(f"{len(unreadable)} pictures cannot be read: {first_few(unreadable)}. Replace or remove them")
    histograms_CKV = np.sum([histograms for histograms, _ in results], axis=0)
    if empty := [camera for camera, camid in dataset.camids.items() if not histograms_CKV[camid].any()]:
        raise UserError(
            f"no training picture of {dataset.root} comes from camera {first_few(empty)}, which has pictures in other "
            "splits, so its style cannot be measured. Add training pictures of it, or use --camera_style none"
        )
    return histograms_CKV


def _chunk_histograms(job: tuple[Sequence[Record], dict[str, int]], advance: Advance) -> tuple[np.ndarray, list[str]]:
    records, camids = job
    histograms_CKV = np.zeros((len(camids), CHANNELS, VALUES), dtype=np.int64)
    unreadable: list[str] = []
    for record in records:
        try:
            histograms_CKV[camids[record.camera]] += picture_histogram(decode(Path(record.path).read_bytes()))
        except (OSError, UnreadablePicture) as error:
            unreadable.append(f"{record.path} ({error})")
        advance(1)
    return histograms_CKV, unreadable
