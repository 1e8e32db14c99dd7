"""`embed`: the features of a folder of pictures, in a file that opens without this project."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.progress import track

from ecn_dist.command import at_least, verb
from ecn_dist.errors import UserError
from ecn_dist.files import check_name
from ecn_dist.packing.layouts import PICTURE_SUFFIXES
from ecn_dist.serving.embedder import Embedder, PictureFile, read_picture
from ecn_dist.serving.feature_file import SUFFIX, FeatureFile


@verb("embed", "example: ecn-dist embed --checkpoint runs/m2d --input pictures/ --output gallery.safetensors")
def main(
    *,
    input: Path,
    output: Path,
    checkpoint: Path,
    config: Path | None = None,
    device: str = "auto",
    batch_size: Annotated[int, at_least(1)] = 128,
) -> int:
    """Write the features of all pictures below a folder to one file, with their names and SHA-256 checksums.

    The file is safetensors, and opens without this project: docs/use.md shows how. `ecn-dist search` searches in it.
    Hidden files and folders are left out, links are followed, and a picture that cannot be decoded ends the command,
    with its name.

    Args:
        input: folder of pictures, in folders or not
        output: the file to write, ending in .safetensors
        checkpoint: the model: a run folder, a checkpoint, or a file of weights
        config: the run's configuration (YAML), if not found by --checkpoint
        device: auto (the accelerator, else the CPU), cpu, cuda, ...
        batch_size: pictures embedded at once
    """
    check_name(output, SUFFIX)
    files = find_pictures(input)
    embedder = Embedder.load(checkpoint, device, config)
    checksums: list[bytes] = []

    def read() -> Iterator[PictureFile]:
        console = Console(stderr=True)
        for name in track(files, "embedding", console=console, transient=True, disable=not console.is_terminal):
            picture = read_picture(input / name)
            checksums.append(hashlib.sha256(picture.data).digest())
            yield picture

    features = embedder(read(), batch_size)
    sha256 = np.frombuffer(b"".join(checksums), dtype=np.uint8).reshape(len(files), -1)
    folder = Path(os.path.relpath(input, output.absolute().parent)).as_posix()
    FeatureFile(features, tuple(files), sha256, embedder.fingerprint, folder).write(output)
    print(f"wrote {output}: {len(files):,} pictures, features of length {embedder.num_features}")
    return 0


def find_pictures(folder: Path) -> list[str]:
    """The pictures below `folder`, sorted, as paths with / relative to it; hidden files and folders are left out."""
    if not folder.is_dir():
        raise UserError(f"--input: there is no folder {folder}")
    names = sorted(path.relative_to(folder).as_posix() for path in _pictures_below(folder, frozenset()))
    if not names:
        raise UserError(f"--input: there are no pictures below {folder} ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return names


def _pictures_below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Links are followed; one that leads nowhere is a picture if it is called so, and fails when it is read."""
    real = folder.resolve()
    if real in above:
        raise UserError(f"--input: the link {folder} leads back to {real}, which it lies in; remove it")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _pictures_below(path, above | {real})
        elif path.suffix.lower() in PICTURE_SUFFIXES and (path.is_file() or path.is_symlink()):
            yield path


if __name__ == "__main__":
    sys.exit(main())
