"""`embed`: the features of a folder of pictures, in a file that opens without this project."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from rich.console import Console
from rich.progress import track

from ecn_dist import distributed
from ecn_dist.command import BatchSize, Checkpoint, Device, RunConfig, verb
from ecn_dist.errors import UserError, printable
from ecn_dist.files import check_name
from ecn_dist.packing.layouts import PICTURE_SUFFIXES, files_below
from ecn_dist.packing.records import first_few
from ecn_dist.serving.embedder import Embedder, PictureFile, read_picture
from ecn_dist.serving.feature_file import SUFFIX, FeatureFile


@verb("embed", "example: ecn-dist embed --checkpoint runs/m2d --input pictures/ --output gallery.safetensors")
def main(
    *,
    input: Path,
    output: Path,
    checkpoint: Checkpoint,
    config: RunConfig | None = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
) -> int:
    """Write the features of all pictures below a folder to one file, with their names and SHA-256 checksums.

    The file is safetensors, and opens without this project: docs/use.md shows how. `ecn-dist search` searches in it.
    Hidden files and folders are left out, links are followed, each folder once, and a picture that cannot be decoded
    ends the command, with its name.

    Args:
        input: folder of pictures, in folders or not
        output: the file to write, ending in .safetensors
    """
    check_name(output, SUFFIX)
    files, left_out = find_pictures(input)
    distributed.keep_freed_memory()
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
    if left_out:
        print(f"left out: {printable(first_few(left_out))}")
    print(f"wrote {output}: {len(files):,} pictures, features of length {embedder.num_features}")
    return 0


def find_pictures(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures below `folder`, sorted, as paths with / relative to it, and what is left out of `files_below` it."""
    if not folder.is_dir():
        raise UserError(f"--input: there is no folder {folder}")
    files, left_out = files_below(folder)
    shown = [PurePosixPath(name) for name in files if not any(part.startswith(".") for part in name.split("/"))]
    names = [str(path) for path in shown if path.suffix.lower() in PICTURE_SUFFIXES]
    if not names:
        raise UserError(f"--input: there are no pictures below {folder} ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return names, left_out


if __name__ == "__main__":
    raise SystemExit(main())
