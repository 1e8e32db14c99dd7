"""`search`: the pictures of a feature file that are nearest to a query picture."""

import hashlib
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import normalize

from ecn_dist.command import Checkpoint, Device, RunConfig, verb
from ecn_dist.data.pictures import UnreadablePicture, decode
from ecn_dist.errors import UserError, printable
from ecn_dist.files import write_atomically
from ecn_dist.methods.options import Count
from ecn_dist.ranking import nearest_pictures
from ecn_dist.reporting.montage import png_of
from ecn_dist.reporting.sheets import draw_answers
from ecn_dist.serving.embedder import Embedder, read_picture
from ecn_dist.serving.feature_file import FeatureFile


@verb("search", "example: ecn-dist search --checkpoint runs/m2d --query img.jpg --gallery g.safetensors --draw out.png")
def main(
    *,
    query: list[Path],
    gallery: Path,
    checkpoint: Checkpoint,
    config: RunConfig | None = None,
    device: Device = "auto",
    top: Count = 10,
    draw: Path | None = None,
    pictures: Path | None = None,
) -> int:
    """Print, and draw, the gallery pictures whose features are nearest to those of query pictures.

    For each match rank, Euclidean distance (0 for the same picture, at most 2) and name. Near is not the same person:
    look at the pictures, and see how often the model errs (docs/use.md). The gallery is a file that `ecn-dist embed`
    wrote with the same model; every picture in it is compared.

    Args:
        query: one picture or several
        gallery: features that `embed` wrote
        top: how many matches
        draw: also draw the matches to this file, ending in .png
        pictures: with --draw: the folder where the gallery's pictures are (default: where they were embedded from)
    """
    if draw and draw.suffix != ".png":
        raise UserError(f"--draw: {draw} must end in .png")
    if pictures and not draw:
        raise UserError("--pictures goes with --draw")
    known = FeatureFile.read(gallery)
    queries = [read_picture(path) for path in query]
    embedder = Embedder.load(checkpoint, device, config)
    if known.model != embedder.fingerprint:
        raise UserError(f"{gallery} is of another model than {checkpoint}; embed the gallery again with this one")
    # Of half precision, features are of unit length but roughly, and the longer ones are not nearer for that.
    asked_QC, known_GC = (normalize(torch.from_numpy(each)) for each in (embedder(queries), known.features))
    distances, rows = nearest_pictures(asked_QC, known_GC, top)
    found = [list(zip(*nearest, strict=True)) for nearest in zip(rows.tolist(), distances.tolist(), strict=True)]
    names = list(map(printable, known.files))
    for asked, matches in zip(queries, found, strict=True):
        print(printable(asked.name))
        for rank, (row, distance) in enumerate(matches, start=1):
            print(f"{rank:6}  {distance:.4f}  {names[row]}")
    if draw:
        folder = pictures or gallery.absolute().parent / known.folder
        lines = [
            (
                printable(Path(asked.name).name),
                decode(asked.data),
                [(names[row], distance, _gallery_picture(known, row, folder)) for row, distance in matches],
            )
            for asked, matches in zip(queries, found, strict=True)
        ]
        caption = f"The nearest of {len(names):,} pictures, with Euclidean distances. Near is not the same person."
        write_atomically(draw, png_of(draw_answers(lines, subtitle=caption)))
        print(f"wrote {draw}")
    return 0


def _gallery_picture(gallery: FeatureFile, row: int, folder: Path) -> Image.Image:
    """The picture that was embedded. `UserError` where it is gone, or is not the same any more."""
    path = folder / gallery.files[row]
    if not path.is_file():
        raise UserError(f"--draw: there is no {path}; name the folder of the gallery's pictures with --pictures")
    data = read_picture(path).data
    if hashlib.sha256(data).digest() != gallery.sha256[row].tobytes():
        raise UserError(f"--draw: {path} is not the picture that was embedded; embed the gallery again")
    try:
        return decode(data)
    except UnreadablePicture as error:  # a file of features may name any file
        raise UserError(f"--draw: {path} cannot be decoded as a picture ({error})") from error


if __name__ == "__main__":
    raise SystemExit(main())
