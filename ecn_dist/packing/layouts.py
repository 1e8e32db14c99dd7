"""Folder layouts of the field's data sets -> records.

market, duke, msmt17     bounding_box_train/, query/, bounding_box_test/ with names like 0002_c1s1_000451_03.jpg:
                         pid before the first _, camera after c; msmt17 in the reshaped form
msmt17-original          train/ and test/ with list_train.txt, list_val.txt, list_query.txt, list_gallery.txt;
                         names like 0000_000_01_0303morning_0008_0.jpg, third field the camera
folder                   any pictures, with a regular expression over their paths or a CSV table
"""

import csv
import io
import os
import posixpath
import re
import stat
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

    Raises:
        UserError: the folder does not fit the layout; names what does not fit.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no such layout: {layout!r}; there are {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise UserError(f"no such data set folder: {root}")
    if layout != "folder" and (pattern or table):
        raise UserError(f"a pattern or table goes with layout folder, not with {layout}")
    if layout == "folder" and (pattern is None) == (table is None):
        raise UserError("layout folder needs either a pattern or a table that says which camera took which picture")
    try:
        styles = root / styles_folder if (root / styles_folder).is_dir() else None
        if layout in MARKET_STYLE:
            return _read_market(layout, root, styles)
        if layout == "msmt17-original":
            return _read_msmt17_original(root, styles)
        return _read_table(root, table, styles) if table else _read_pattern(root, str(pattern), styles)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}). Check that you have the right to"
        ) from error


def files_below(root: Path, but: Path | None = None) -> tuple[list[str], list[str]]:
    """What is in a folder and in the folders in it; links to folders are followed, each folder once.

    Args:
        but: a folder to leave out.

    Returns:
        The regular files, sorted, as paths below `root` with /; and what else there is: links to a folder that was met
        before, as a loop does, and pipes, sockets and devices, which might never end.

    Raises:
        OSError: a folder may not be read.
    """
    files: list[str] = []
    left_out: list[str] = []
    met: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # which grows by the links: what is a folder itself comes before links to it
        for folder, folders, names in os.walk(start, onerror=_refuse):
            below = Path(folder).relative_to(root)
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in met:
                left_out.append(f"{below.as_posix()} (a link to a folder that is there already)")
                folders.clear()
                continue
            met.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in sorted(folders) if Path(folder, name) != but]
            starts += [Path(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in names:
                (files if _is_regular(os.path.join(folder, name)) else left_out).append((below / name).as_posix())
    return sorted(files), sorted(left_out)


def _refuse(error: OSError) -> None:
    raise error


def _is_regular(path: str) -> bool:
    """Whether it can be read to its end. A broken link passes, and is an error when it is read."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _read_market(layout: str, root: Path, styles: Path | None) -> Dataset:
    splits: dict[str, list[Record]] = {}
    ignored: list[str] = []
    unfit: list[str] = []
    for split, folder in MARKET_FOLDERS.items():
        if not (root / folder).is_dir():
            continue
        splits[split] = []
        for entry in os.scandir(root / folder):
            match = _MARKET_NAME.match(entry.name)
            if not _is_picture(entry.name) or not _is_regular(entry.path):
                ignored.append(f"{folder}/{entry.name}")
            elif match is None:
                unfit.append(f"{folder}/{entry.name}")
            else:
                camera = _camera(match["camid"])
                splits[split].append(Record(entry.name, entry.path, int(match["pid"]), camera))
    if not splits:
        there = first_few(sorted(entry.name for entry in os.scandir(root))) or "nothing"
        raise UserError(f"{root} has none of the folders {', '.join(MARKET_FOLDERS.values())}; it holds {there}")
    _refuse_unfit(
        unfit, f"fit no name of layout {layout} (such as 0002_c1s1_000451_03.jpg: pid, then c and the camera)"
    )
    distractor_pid = 0 if layout == "market" else None
    return collect(layout, root, splits, distractor_pid=distractor_pid, ignored=sorted(ignored), styles_folder=styles)


def _read_msmt17_original(root: Path, styles: Path | None) -> Dataset:
    splits: dict[str, list[Record]] = {}
    unfit: list[str] = []
    missing: list[str] = []
    for split, (folder, lists) in _MSMT17_LISTS.items():
        if not (root / lists[0]).is_file():
            continue
        splits[split] = []
        for name in lists:
            for line in _lines(root / name):
                path, _, pid = line.rpartition(" ")
                fields = path.rpartition("/")[2].split("_")
                fits = pid.isdecimal() and len(fields) >= 4 and fields[2].isdecimal()
                record = _record(root / folder, path, pid, fields[2]) if fits else None
                if record is None:
                    unfit.append(f"{name}: {line[:200]!r}")
                elif not os.path.isfile(record.path):
                    missing.append(f"{folder}/{record.file}")
                else:
                    splits[split].append(record)
    if not splits:
        raise UserError(f"{root} has none of the lists that layout msmt17-original begins with: list_train.txt, ...")
    _refuse_unfit(unfit, "are no list entries of msmt17-original (such as 0000/0000_000_01_0303morning_0008_0.jpg 0)")
    _refuse_unfit(missing, f"are listed, but not in {root}")
    return collect("msmt17-original", root, splits, styles_folder=styles)


def _read_pattern(root: Path, pattern: str, styles: Path | None) -> Dataset:
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
    by_folder = "split" not in groups and any((root / name).is_dir() for name in _SPLIT_OF_FOLDER)
    splits: dict[str, list[Record]] = {}
    unfit: list[str] = []
    files, ignored = files_below(root, but=styles)
    for name in files:
        if not _is_picture(name):
            ignored.append(name)
            continue
        match = expression.search(name)
        if match is None:
            unfit.append(name)
            continue
        found = match.groupdict()
        split = name.partition("/")[0] if by_folder else found.get("split") or "train"
        record = _record(root, name, found.get("pid"), found["camid"])
        if record is None or split not in _SPLIT_OF_FOLDER:
            unfit.append(name)
        else:
            splits.setdefault(_SPLIT_OF_FOLDER[split], []).append(record)
    if not splits and not unfit:
        raise UserError(f"there are no pictures below {root}")
    _refuse_unfit(
        unfit,
        f"do not fit the pattern {pattern!r}: it must find a camid, a pid that is a whole number or nothing, and where "
        f"there are several splits one of {', '.join(_SPLIT_OF_FOLDER)}, as a group or as the first folder",
    )
    return collect("folder", root, splits, unknown_in_train=True, ignored=ignored, styles_folder=styles)


def _read_table(root: Path, table: Path, styles: Path | None) -> Dataset:
    if not table.is_file():
        raise UserError(f"no such table: {table}")
    splits: dict[str, list[Record]] = {}
    unfit: list[str] = []
    missing: list[str] = []
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), skipinitialspace=True)
    try:
        columns = reader.fieldnames or []
        if not {"path", "camid"} <= set(columns):
            raise UserError(f"{table} needs the columns path and camid, and may have pid and split; it has: {columns}")
        for row in reader:
            split = row.get("split") or "train"
            record = None if None in row else _record(root, row["path"], row.get("pid"), row["camid"])
            if record is None or split not in _SPLIT_OF_FOLDER:
                unfit.append(f"line {reader.line_num}")
            elif not os.path.isfile(record.path):
                missing.append(record.file)
            else:
                splits.setdefault(_SPLIT_OF_FOLDER[split], []).append(record)
    except csv.Error as error:
        raise UserError(f"{table} is no CSV table, after line {reader.line_num}: {error}") from error
    _refuse_unfit(
        unfit,
        f"of {table} need a path below {root}, a camid of at most {MOST_CHARACTERS} characters, a pid that is a whole "
        f"number or nothing, a split that is one of {', '.join(_SPLIT_OF_FOLDER)} or nothing (train), and no more",
    )
    _refuse_unfit(missing, f"are in {table}, but not below {root}")
    dataset = collect("folder", root, splits, unknown_in_train=True, styles_folder=styles)
    _refuse_shared(dataset)
    return dataset


def _refuse_shared(dataset: Dataset) -> None:
    """`UserError` where results would be measured on training pictures, or a query would find itself."""
    train, query, gallery = ({record.file for record in dataset.splits.get(name, ())} for name in MARKET_FOLDERS)
    _refuse_unfit([*(train & (query | gallery))], "are training pictures and pictures to test on at once")
    if len(dataset.cameras) == 1:  # of several, evaluation leaves out the query's own
        _refuse_unfit([*(query & gallery)], "are query and gallery at once, and there is one camera alone")


def _is_picture(name: str) -> bool:
    """By its suffix; hidden files (such as the ._ companions that macOS leaves in archives) are none."""
    path = Path(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _record(root: Path, name: str | None, pid: str | None, camera: str | None) -> Record | None:
    """A record of a picture below `root`, or None where a value cannot be one. An absent pid is unknown."""
    pid, camera = (pid or "").strip() or str(UNKNOWN_PID), (camera or "").strip()
    if not name or not 0 < len(camera) <= MOST_CHARACTERS or not re.fullmatch(r"-1|\d{1,18}", pid):
        return None
    name = posixpath.normpath(name)  # one name for one picture
    if name.startswith(("/", "../")) or name in (".", ".."):
        return None
    return Record(name, str(root / name), int(pid), _camera(camera))


def _camera(name: str) -> str:
    """A camera's name; numbers without leading zeros."""
    return str(int(name)) if name.isdecimal() else name


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: layout msmt17-original needs all four of its lists")
    return [line for line in _text(path).splitlines() if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8") from error


def _refuse_unfit(items: list[str], what: str) -> None:
    if items:
        raise UserError(f"{len(items)} {what}: {first_few(sorted(items))}")
