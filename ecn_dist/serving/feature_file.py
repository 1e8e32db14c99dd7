"""Features of pictures in a file that opens without this project: safetensors, never pickled.

docs/use.md, "The feature file", describes it and shows how to read it. n pictures, C feature length.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ecn_dist.errors import UserError
from ecn_dist.files import check_name, write_atomically

FORMAT, VERSION = "ecn_dist features", "1"
SUFFIX = ".safetensors"
NAMES_LIMIT = 90 * 10**6  # bytes; a header of safetensors may have 100 million
LENGTH_TOLERANCE = 0.02  # half-precision features are of unit length only roughly


@dataclass(frozen=True)
class FeatureFile:
    """Features with the pictures that they are of."""

    features: np.ndarray  # (n, C) float32, rows of unit length
    files: tuple[str, ...]  # names of the pictures below `folder`, with /
    sha256: np.ndarray  # (n, 32) uint8, the checksums of the picture files
    model: str  # fingerprint of the model: features of another are not comparable
    folder: str  # where the pictures are, relative to the feature file's own folder

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all. `UserError` for a name that `files.check_name` refuses."""
        check_name(path, SUFFIX)
        names = json.dumps(self.files)
        if len(names) > NAMES_LIMIT:
            raise UserError(f"{path}: names of {len(self.files)} pictures are too long for one file; embed fewer")
        about = {"format": FORMAT, "version": VERSION, "model": self.model, "folder": self.folder, "files": names}
        arrays = {"features": self.features, "sha256": self.sha256}
        write_atomically(path, save({key: np.ascontiguousarray(array) for key, array in arrays.items()}, about))

    @classmethod
    def read(cls, path: Path) -> "FeatureFile":
        """Raises `UserError` where there is no such file, or it is no feature file."""
        if not path.is_file():
            raise UserError(f"there is no file of features {path}; write one: ecn-dist embed ... --output {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                found = about.get("format"), about.get("version")
                if found != (FORMAT, VERSION):
                    raise ValueError(f"it is of format {found[0]!r} {found[1]}, not {FORMAT!r} {VERSION}")
                names = tuple(json.loads(about["files"]))
                features, sha256 = file.get_tensor("features"), file.get_tensor("sha256")
            if not all(isinstance(name, str) and "\0" not in name for name in names):
                raise ValueError("its names are not all names of files")
            if features.dtype != np.float32 or features.ndim != 2 or len(features) != len(names):
                raise ValueError(f"features {features.dtype} {features.shape} for {len(names)} names")
            if sha256.dtype != np.uint8 or sha256.shape != (len(names), 32):
                raise ValueError(f"sha256 {sha256.dtype} {sha256.shape} for {len(names)} names")
            lengths_n = np.sqrt(np.einsum("nc,nc->n", features, features))
            wrong = np.flatnonzero(~(np.abs(lengths_n - 1) <= LENGTH_TOLERANCE))  # so written, NaN is wrong too
            if len(wrong):
                raise ValueError(f"the feature of row {wrong[0]} is of length {lengths_n[wrong[0]]:.3g}, not 1")
            return cls(features, names, sha256, about["model"], about["folder"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}: is no file of features ({reason}); write it again with ecn-dist embed") from error
