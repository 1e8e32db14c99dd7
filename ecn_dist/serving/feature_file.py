"""Features of pictures in a file that opens without this project: safetensors or npz, never pickled.

docs/use.md, "The feature file", is its description and shows how to read it. Shape letters: n pictures, C feature
length.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ecn_dist.errors import UserError

FORMAT, VERSION = "ecn_dist features", "1"
SUFFIXES = (".safetensors", ".npz")
SAFETENSORS_NAMES_LIMIT = 90 * 10**6  # bytes; its header may have 100 million
SHA256_BYTES = 32


@dataclass(frozen=True)
class FeatureFile:
    """Features with the pictures that they are of."""

    features: np.ndarray
    """(n, C) float32, rows of unit length"""
    files: tuple[str, ...]
    """names of the pictures below `folder`, with /"""
    sha256: np.ndarray
    """(n, 32) uint8, the checksums of the picture files"""
    model: str
    """fingerprint of the model: features of another are not comparable"""
    folder: str
    """where the pictures are, relative to the feature file's own folder"""

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all. `check_output` says which names it may have."""
        check_output(path)
        about = {"format": FORMAT, "version": VERSION, "model": self.model, "folder": self.folder}
        arrays = {"features": self.features, "sha256": self.sha256}
        if path.suffix == ".npz":
            arrays |= {"files": np.array(self.files, dtype=np.str_), "about": np.array(json.dumps(about))}
            _write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
            return
        names = json.dumps(self.files)
        if len(names) > SAFETENSORS_NAMES_LIMIT:
            raise UserError(f"{path}: the names of {len(self.files)} pictures are too long for safetensors; write .npz")
        data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()}, about | {"files": names})
        _write_atomically(path, lambda file: file.write(data))

    @classmethod
    def read(cls, path: Path) -> "FeatureFile":
        """Raises `UserError` where there is no such file, or it is no feature file."""
        if not path.is_file():
            raise UserError(f"there is no file of features {path}; write one: ecn-dist embed ... --output {path}")
        try:
            return (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)._checked()
        except (SafetensorError, BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"{path}: is no file of features ({error}); write it again with ecn-dist embed") from error

    def _checked(self) -> "FeatureFile":
        n = len(self.files)
        if self.features.dtype != np.float32 or self.features.ndim != 2 or len(self.features) != n:
            raise ValueError(f"features {self.features.dtype} {self.features.shape} for {n} names")
        if self.sha256.dtype != np.uint8 or self.sha256.shape != (n, SHA256_BYTES):
            raise ValueError(f"sha256 {self.sha256.dtype} {self.sha256.shape} for {n} names")
        return self


def check_output(path: Path) -> None:
    """Raise `UserError` where `path` is no name for a feature file; to be asked before the work is done."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: features are written as {' or '.join(SUFFIXES)}; give such a name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


def _read_npz(path: Path) -> FeatureFile:
    with np.load(path, allow_pickle=False) as arrays:
        about = _about(json.loads(str(arrays["about"])))
        files = tuple(arrays["files"].tolist())
        return FeatureFile(arrays["features"], files, arrays["sha256"], about["model"], about["folder"])


def _read_safetensors(path: Path) -> FeatureFile:
    with safe_open(path, framework="numpy") as file:
        about = _about(file.metadata() or {})
        files = tuple(map(str, json.loads(about["files"])))
        return FeatureFile(
            file.get_tensor("features"), files, file.get_tensor("sha256"), about["model"], about["folder"]
        )


def _about(about: dict[str, str]) -> dict[str, str]:
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"format {about.get('format')!r} {about.get('version')}, not {FORMAT!r} {VERSION}")
    return about


def _write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
