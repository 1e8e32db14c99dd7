"""`search`: the pictures of a feature file that are nearest to a query picture."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ecn_dist.command import command
from ecn_dist.data import jpeg
from ecn_dist.embed import add_model_options, read_picture
from ecn_dist.errors import UserError
from ecn_dist.ranking.nearest import ExactSearch, FaissSearch, Matches, nearest
from ecn_dist.reporting.montage import save_figure
from ecn_dist.reporting.sheets import draw_answers
from ecn_dist.serving.embedder import Embedder, PictureFile
from ecn_dist.serving.feature_file import FeatureFile

DESCRIPTION = """\
Print, and draw, the gallery pictures whose features are nearest to those of query pictures: rank, Euclidean distance
(0 for the same picture, at most 2) and name. Near is not the same person: look at the pictures, and see how often the
model errs (docs/use.md).

The gallery is a file that `ecn-dist embed` wrote with the same model. --index exact looks at every picture.
--index faiss does so with FAISS, with equal results; --index faiss:HNSW32 and the like (FAISS's factory strings) are
quicker in very large galleries and may miss some. FAISS is an extra: pip install 'ecn_dist[search]'."""

EXAMPLE = "example: ecn-dist search --checkpoint runs/m2d --query img.jpg --gallery gallery.safetensors --draw out.png"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ecn-dist search",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--query", required=True, nargs="+", type=Path, metavar="PICTURE", help="one or several")
    parser.add_argument("--gallery", required=True, type=Path, metavar="FILE", help="features that `embed` wrote")
    add_model_options(parser)
    parser.add_argument("--top", type=int, default=10, help="how many matches (default: 10)")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="also draw the matches")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="with --draw: where the gallery's pictures are (default: where they were embedded from)",
    )
    parser.add_argument("--index", default="exact", help="exact (the default), faiss, or faiss:FACTORY")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Embed the queries, find their matches, print them and where asked draw them."""
    options = parse(argv)
    if options.draw and options.draw.suffix != ".png":
        raise UserError(f"--draw: {options.draw} must end in .png")
    if options.pictures and not options.draw:
        raise UserError("--pictures goes with --draw")
    gallery = FeatureFile.read(options.gallery)
    queries = [read_picture(path) for path in options.query]
    embedder = Embedder.load(options.checkpoint, options.device, options.config)
    if gallery.model != embedder.fingerprint:
        raise UserError(
            f"{options.gallery} has features of another model ({gallery.model[:12]}) than {options.checkpoint} "
            f"({embedder.fingerprint[:12]}), and they are not comparable; embed the gallery again with this model"
        )
    found = nearest(_index(options.index, gallery), embedder(queries), options.top)
    for query, matches in zip(queries, found, strict=True):
        print(_table(query, gallery, matches))
    if options.draw:
        folder = options.pictures or options.gallery.absolute().parent / gallery.folder
        _draw(queries, gallery, found, folder, options.draw)
        print(f"wrote {options.draw}")
    return 0


def _index(name: str, gallery: FeatureFile) -> ExactSearch | FaissSearch:
    kind, _, factory = name.partition(":")
    if name == "exact":
        return ExactSearch(gallery.features)
    if kind == "faiss":
        return FaissSearch(gallery.features, factory or "Flat")
    raise UserError(f"--index: {name!r} is none of exact, faiss and faiss:FACTORY, such as faiss:HNSW32")


def _table(query: PictureFile, gallery: FeatureFile, matches: Matches) -> str:
    lines = [_printable(query.name)]
    for rank, (row, distance) in enumerate(zip(matches.rows, matches.distances, strict=True), start=1):
        lines.append(f"{rank:6}  {distance:.4f}  {_printable(gallery.files[row])}")
    return "\n".join(lines)


def _printable(name: str) -> str:
    """File names need not be text in any encoding."""
    return name.encode("utf-8", "backslashreplace").decode()


def _draw(
    queries: Sequence[PictureFile], gallery: FeatureFile, found: Sequence[Matches], folder: Path, output: Path
) -> None:
    rows = []
    for query, matches in zip(queries, found, strict=True):
        answers = [
            (_printable(gallery.files[row]), float(distance), _gallery_picture(gallery, int(row), folder))
            for row, distance in zip(matches.rows, matches.distances, strict=True)
        ]
        rows.append((_printable(Path(query.name).name), jpeg.decode(query.data), answers))
    caption = (
        f"The nearest among {len(gallery.files):,} pictures, with Euclidean distances. Near is not the same person."
    )
    save_figure(draw_answers(rows, subtitle=caption), output, title="Nearest pictures", caption=caption)


def _gallery_picture(gallery: FeatureFile, row: int, folder: Path) -> Image.Image:
    """The picture that was embedded. `UserError` where it is gone, or is not the same any more."""
    path = folder / gallery.files[row]
    if not path.is_file():
        raise UserError(f"--draw: there is no {path}; name the folder of the gallery's pictures with --pictures")
    data = read_picture(path).data
    if hashlib.sha256(data).digest() != gallery.sha256[row].tobytes():
        raise UserError(f"--draw: {path} is not the picture that was embedded; embed the gallery again")
    return jpeg.decode(data)


if __name__ == "__main__":
    sys.exit(main())
