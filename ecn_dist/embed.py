"""`embed`: the features of a folder of pictures, in a file that opens without this project."""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ecn_dist.command import command
from ecn_dist.errors import UserError
from ecn_dist.packing.layouts import PICTURE_SUFFIXES
from ecn_dist.serving.embedder import Embedder, PictureFile
from ecn_dist.serving.feature_file import FeatureFile, check_output

DESCRIPTION = """\
Write the features of all pictures below a folder to one file, with their names and SHA-256 checksums. The file is
safetensors or npz, and opens without this project: docs/use.md shows how. `ecn-dist search` searches in it.
A picture that cannot be decoded ends the command, with its name."""

EXAMPLE = "example: ecn-dist embed --checkpoint runs/m2d --input pictures/ --output gallery.safetensors"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ecn-dist embed",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="pictures, in folders or not")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="features.safetensors or features.npz"
    )
    add_model_options(parser)
    parser.add_argument("--batch_size", type=int, default=128, help="pictures embedded at once (default: 128)")
    return parser.parse_args(argv)


def add_model_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """The options that `Embedder.load` takes; without `device` where only the CPU will do."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="the model: a run folder, a checkpoint, or a file of weights",
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="the run's configuration, if not found by PATH")
    if device:
        parser.add_argument("--device", default="auto", help="auto (the accelerator, else the CPU), cpu, cuda, ...")


@command
def main(argv: list[str] | None = None) -> int:
    """Embed the folder's pictures, write the file and say what is in it."""
    options = parse(argv)
    check_output(options.output)
    files = find_pictures(options.input)
    embedder = Embedder.load(options.checkpoint, options.device, options.config)
    checksums: list[bytes] = []

    def read() -> Iterator[PictureFile]:
        console = Console(stderr=True)
        for name in track(files, "embedding", console=console, transient=True, disable=not console.is_terminal):
            picture = read_picture(options.input / name)
            checksums.append(hashlib.sha256(picture.data).digest())
            yield picture

    features = embedder(read(), options.batch_size)
    FeatureFile(
        features=features,
        files=tuple(files),
        sha256=np.frombuffer(b"".join(checksums), dtype=np.uint8).reshape(len(files), -1),
        model=embedder.fingerprint,
        folder=Path(os.path.relpath(options.input, options.output.absolute().parent)).as_posix(),
    ).write(options.output)
    print(f"wrote {options.output}: {len(files):,} pictures, features of length {embedder.num_features}")
    return 0


def find_pictures(folder: Path) -> list[str]:
    """The pictures below `folder`, sorted, as paths with / relative to it; hidden files and folders are left out."""
    if not folder.is_dir():
        raise UserError(f"--input: there is no folder {folder}")
    files = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    ]
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise UserError(f"--input: there are no pictures below {folder} ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return names


def read_picture(path: Path) -> PictureFile:
    """The picture file's bytes under its path's name."""
    try:
        return PictureFile(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
