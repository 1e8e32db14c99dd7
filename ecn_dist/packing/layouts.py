"""Folder layouts of the field's data sets -> records; docs/data.md shows them."""

import csv
import io
import os
import posixpath
import re
from pathlib import Path

from ecn_dist.data.index import UNKNOWN_PID
from ecn_dist.errors import UserError
from ecn_dist.packing.records import Dataset, Record, collect, first_few

MARKET_STYLE = ("market", "duke", "msmt17")
LAYOUTS = (*MARKET_STYLE, "msmt17-original", "folder")
MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
STYLES_FOLDER = "bounding_box_train_camstyle"
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
MOST_CHARACTERS = 100  # of a camera's name

_MARKET_NAME = re.compile(r"(?P<pid>-1|\d{1,18})_c(?P<camid>\d+)")
_SPLIT_OF_FOLDER = {name: name for name in MARKET_FOLDERS} | {folder: name for name, folder in MARKET_FOLDERS.items()}
_MSMT17_LISTS = {
    "train": ("train", ("list_train.txt", "list_val.txt")),
    "query": ("test", ("list_query.txt",)),
    "gallery": ("test", ("list_gallery.txt",)),
}


def read_dataset(
    layout: str,
    root: Path,
    *,
    pattern: str | None = None,
    table: Path | None = None,
    styles_folder: str = STYLES_FOLDER,
) -> Dataset:
    """The pictures of the data set in `root`.

    Args:
        layout: one of `LAYOUTS`.
        pattern: for `folder`: a regular expression searched in each picture's path below `root` (with /), with the
            groups `camid`, and where known `pid` and `split`.
        table: for `folder`, instead of a pattern: a CSV file with the columns path, camid, and where known pid, split.
        styles_folder: where below `root` the data set keeps its style copies, if it has any.

    Raises `UserError`, which names what does not fit the layout, and `OSError` for a folder that may not be read.
    """
    if not root.is_dir():
        raise UserError(f"no such data set folder: {root}")
    if layout != "folder" and (pattern or table):
        raise UserError(f"a pattern or table goes with layout folder, not with {layout}")
    if layout == "folder" and (pattern is None) == (table is None):
        raise UserError("layout folder needs either a pattern or a table that says which camera took which picture")
    found = _Found(root)
    styles = root / styles_folder if (root / styles_folder).is_dir() else None
    if layout in MARKET_STYLE:
        _read_market(found, layout)
    elif layout == "msmt17-original":
        _read_msmt17_original(found)
    elif table is not None:
        _read_table(found, table)
    else:
        _read_pattern(found, str(pattern), styles)
    dataset = collect(layout, root, found.splits, sorted(found.ignored), styles)
    if table is not None:  # or results are measured on training pictures, or a query finds itself
        train, query, gallery = ({record.file for record in dataset.splits.get(name, ())} for name in MARKET_FOLDERS)
        _refuse([*(train & (query | gallery))], "are training pictures and pictures to test on at once")
        if len(dataset.cameras) == 1:  # of several, evaluation leaves out the query's own
            _refuse([*(query & gallery)], "are query and gallery at once, and there is one camera alone")
    return dataset


def files_below(root: Path, but: Path | None = None) -> tuple[list[str], list[str]]:
    """What is in a folder and in the folders in it; links to folders are followed, each folder once.

    Returns the regular files but those below `but`, sorted, as paths below `root` with /; and what else there is: links
    to a folder that was met before, as a loop does, and pipes, sockets and devices, which might never end. Raises
    `OSError` where a folder may not be read.
    """
    files: list[str] = []
    left_out: list[str] = []
    met: set[tuple[int, int]] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:  # what is a folder itself comes before links to it
        folder = (waiting or links).pop(0)
        below, status = folder.relative_to(root), os.stat(folder)
        if (status.st_dev, status.st_ino) in met:
            left_out.append(f"{below.as_posix()} (a link to a folder that is there already)")
            continue
        met.add((status.st_dev, status.st_ino))
        inside: list[Path] = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not os.path.isdir(entry.path):
                (files if _is_regular(entry.path) else left_out).append((below / entry.name).as_posix())
            elif folder / entry.name != but:
                (links if entry.is_symlink() else inside).append(folder / entry.name)
        waiting[:0] = inside
    return sorted(files), sorted(left_out)


def _is_regular(path: str) -> bool:
    """Whether it can be read to its end. A broken link passes, and is an error when it is read."""
    return os.path.isfile(path) or not os.path.exists(path)


class _Found:
    """The records of `root` by split, and what are none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.splits: dict[str, list[Record]] = {}
        self.ignored: list[str] = []  # no pictures
        self.unfit: list[str] = []  # as errors name them

    def add(
        self, entry: str, split: str, name: str | None, pid: str | None, camera: str | None, below: str = ""
    ) -> None:
        """A picture of that name in the folder `below` the root. An absent pid is unknown."""
        pid, camera = (pid or "").strip() or str(UNKNOWN_PID), (camera or "").strip()
        name = posixpath.normpath(name or ".")  # one name for one picture
        fits = re.fullmatch(r"-1|\d{1,18}", pid) and 0 < len(camera) <= MOST_CHARACTERS
        if not fits or split not in _SPLIT_OF_FOLDER or name.startswith(("/", "../")) or name in (".", ".."):
            self.unfit.append(entry)
            return
        if camera.isdecimal():
            camera = str(int(camera))
        record = Record(name, str(self.root / below / name), int(pid), camera)
        self.splits.setdefault(_SPLIT_OF_FOLDER[split], []).append(record)

    def refuse_missing(self, what: str) -> None:
        records = [record for split in self.splits.values() for record in split]
        missing = [record for record in records if not os.path.isfile(record.path)]
        _refuse([Path(record.path).relative_to(self.root).as_posix() for record in missing], what)


def _read_market(found: _Found, layout: str) -> None:
    for split, folder in MARKET_FOLDERS.items():
        if not (found.root / folder).is_dir():
            continue
        found.splits[split] = []
        for entry in os.scandir(found.root / folder):
            if not _is_picture(entry.name) or not _is_regular(entry.path):
                found.ignored.append(f"{folder}/{entry.name}")
                continue
            match = _MARKET_NAME.match(entry.name)
            pid, camera = (match["pid"], match["camid"]) if match else (None, None)
            found.add(f"{folder}/{entry.name}", split, entry.name, pid, camera, folder)
    if not found.splits:
        there = first_few(sorted(entry.name for entry in os.scandir(found.root))) or "nothing"
        raise UserError(f"{found.root} has none of the folders {', '.join(MARKET_FOLDERS.values())}; it holds {there}")
    _refuse(
        found.unfit, f"fit no name of layout {layout} (such as 0002_c1s1_000451_03.jpg: pid, then c and the camera)"
    )


def _read_msmt17_original(found: _Found) -> None:
    for split, (folder, lists) in _MSMT17_LISTS.items():
        if not (found.root / lists[0]).is_file():
            continue
        found.splits[split] = []
        for name in lists:
            if not (found.root / name).is_file():
                raise UserError(f"{found.root / name} is missing: layout msmt17-original needs all four of its lists")
            for line in filter(str.strip, _text(found.root / name).splitlines()):
                path, _, pid = line.rpartition(" ")
                fields = path.rpartition("/")[2].split("_")
                fits = pid.isdecimal() and len(fields) >= 4 and fields[2].isdecimal()
                found.add(f"{name}: {line[:200]!r}", split, path, pid, fields[2] if fits else None, folder)
    if not found.splits:
        raise UserError(f"{found.root} has none of the lists of layout msmt17-original: list_train.txt, ...")
    _refuse(found.unfit, "are no list entries of msmt17-original (such as 0000/0000_000_01_0303morning_0008_0.jpg 0)")
    found.refuse_missing(f"are listed, but not in {found.root}")


def _read_pattern(found: _Found, pattern: str, styles: Path | None) -> None:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    groups = set(expression.groupindex)
    if "camid" not in groups or groups - {"pid", "camid", "split"}:
        raise UserError(
            "the pattern needs the named group (?P<camid>...), and may have (?P<pid>...) and (?P<split>...); "
            f"its named groups: {first_few(sorted(groups)) or 'none'}"
        )
    by_folder = "split" not in groups and any((found.root / name).is_dir() for name in _SPLIT_OF_FOLDER)
    files, found.ignored = files_below(found.root, but=styles)
    for name in files:
        if not _is_picture(name):
            found.ignored.append(name)
            continue
        match = expression.search(name)
        values = match.groupdict() if match else {}
        split = name.partition("/")[0] if by_folder else values.get("split") or "train"
        found.add(name, split, name, values.get("pid"), values.get("camid"))
    if not found.splits and not found.unfit:
        raise UserError(f"there are no pictures below {found.root}")
    _refuse(
        found.unfit,
        f"do not fit the pattern {pattern!r}: it must find a camid, a pid that is a whole number or nothing, and where "
        f"there are several splits one of {', '.join(_SPLIT_OF_FOLDER)}, as a group or as the first folder",
    )


def _read_table(found: _Found, table: Path) -> None:
    if not table.is_file():
        raise UserError(f"no such table: {table}")
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), skipinitialspace=True)
    try:
        columns = reader.fieldnames or []
        if not {"path", "camid"} <= set(columns):
            raise UserError(f"{table} needs the columns path and camid, and may have pid and split; it has: {columns}")
        for row in reader:
            path = None if None in row else row["path"]  # None has what stands beyond the columns
            found.add(f"line {reader.line_num}", row.get("split") or "train", path, row.get("pid"), row["camid"])
    except csv.Error as error:
        raise UserError(f"{table} is no CSV table, after line {reader.line_num}: {error}") from error
    _refuse(
        found.unfit,
        f"of {table} need a path below {found.root}, a camid of at most {MOST_CHARACTERS} characters, a pid that is "
        f"a whole number or nothing, a split that is one of {', '.join(_SPLIT_OF_FOLDER)} or nothing (train), "
        "and no more",
    )
    found.refuse_missing(f"are in {table}, but not below {found.root}")


def _is_picture(name: str) -> bool:
    """By its suffix; hidden files (such as the ._ companions that macOS leaves in archives) are none."""
    path = Path(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8") from error


def _refuse(items: list[str], what: str) -> None:
    if items:
        raise UserError(f"{len(items)} {what}: {first_few(sorted(items))}")
