"""The sheets of pictures of a run, each a montage: which pictures stand where, and what is written at them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.clustering.quality import cross_camera_share
from ecn_dist.reporting.montage import FAINT_INK, LEGEND, Cell, Row, montage
from ecn_dist.reporting.ranked import Match, RankedList

ReadPicture = Callable[[int], Image.Image]
ReadCopy = Callable[[int, int], Image.Image | None]
Answer = tuple[str, float, Image.Image]  # name, distance, picture

NO_PICTURE = NOBODY = -1
MAX_CAMERAS = 8  # more do not fit a page
PEOPLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00")  # frames of people in a cluster


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain, by row; pids below 0, and None, are not known."""

    name: str
    camids: np.ndarray
    read: ReadPicture
    pids: np.ndarray | None = None

    @property
    def known_pids(self) -> np.ndarray | None:
        """The pids, None where no picture has one."""
        return None if self.pids is None or not (np.asarray(self.pids) >= 0).any() else np.asarray(self.pids)

    def shown_cameras(self) -> list[int]:
        """At most MAX_CAMERAS of its cameras, evenly spaced."""
        cameras = np.unique(self.camids)
        places = np.linspace(0, len(cameras) - 1, min(len(cameras), MAX_CAMERAS)).round().astype(int)
        return cameras[places].tolist()


def draw_ranked_lists(
    lists: Sequence[RankedList], read_query: ReadPicture, read_gallery: ReadPicture, *, title: str, subtitle: str
) -> Figure:
    """One row a query, with its nearest gallery pictures; `read_query` and `read_gallery` read by row of the whole."""
    rows = []
    for ranked in lists:
        facts = [f"query {ranked.query}", "" if ranked.camid is None else f"camera {ranked.camid}"]
        facts += [f"AP {100 * ranked.average_precision:.1f} %"]
        facts += [f"{ranked.num_right} true match{'es' * (ranked.num_right != 1)}"]
        facts += [f"first at rank {ranked.first_right.rank:,}"] if ranked.first_right else []
        answers = [_answer(match, read_gallery) for match in ranked.matches]
        rows.append(Row("\n".join(filter(None, facts)), [Cell(read_query(ranked.query), "query", "query"), *answers]))
    rows = rows or [Row("", [Cell(words="No query has a true match.")])]
    return montage(rows, title=title, subtitle=f"{subtitle} {LEGEND}")


def draw_failures(
    lists: Sequence[RankedList], read_query: ReadPicture, read_gallery: ReadPicture, *, subtitle: str, columns: int = 3
) -> Figure:
    """For each query whose first answer is wrong: it, that answer, and the true match that should have been first."""
    blocks: list[list[Cell]] = []
    for ranked in lists:
        if ranked.matches and not ranked.matches[0].right and ranked.first_right:
            words = f"query {ranked.query}\nAP {100 * ranked.average_precision:.1f} %"
            pair = (_answer(match, read_gallery) for match in (ranked.matches[0], ranked.first_right))
            blocks.append([Cell(read_query(ranked.query), words, "query"), *pair])
    blocks = blocks or [[Cell(words="None among these queries: a true match came first every time.")]]
    rows = [
        Row("", [cell for block in blocks[at : at + columns] for cell in (*block, Cell())][:-1])
        for at in range(0, len(blocks), columns)
    ]
    return montage(rows, title="Failures", subtitle=f"{subtitle} {LEGEND}")


def _answer(match: Match, read: ReadPicture) -> Cell:
    words = f"{match.rank:,}" if match.camid is None else f"{match.rank:,} · cam {match.camid}"
    return Cell(read(match.row), words, "right" if match.right else "wrong")


def draw_answers(queries: Sequence[tuple[str, Image.Image, Sequence[Answer]]], *, subtitle: str = "") -> Figure:
    """One row a query of unknown people: its name and picture, then each answer's, with rank, distance and name."""

    def short(name: str) -> str:
        return name if len(name) <= 16 else "…" + name[-15:]

    rows = []
    for name, picture, answers in queries:
        cells = [Cell(shown, f"{at}: {far:.3f}\n{short(of)}") for at, (of, far, shown) in enumerate(answers, start=1)]
        rows.append(Row("", [Cell(picture, f"query\n{short(name)}", "query"), *cells]))
    return montage(rows, title="Nearest pictures", subtitle=subtitle)


def draw_domains(domains: Sequence[Domain], *, per_camera: int = 10, seed: int = 0) -> Figure:
    """One domain after another, one line a camera; where pids are known, one column of a domain is one person."""
    lines, about = [], []
    for domain in domains:
        cameras, of_all = domain.shown_cameras(), len(np.unique(domain.camids))
        picked = pick_by_camera(np.asarray(domain.camids), domain.known_pids, cameras, per_camera, seed)
        for camera, rows in zip(cameras, picked.tolist(), strict=True):
            cells = [Cell() if row == NO_PICTURE else Cell(domain.read(row)) for row in rows]
            lines.append(Row(f"{domain.name}\ncamera {camera}", cells))
        some = f" ({len(cameras)} of {of_all} cameras shown)" if of_all > len(cameras) else ""
        about.append(f"{domain.name}: {len(domain.camids):,} pictures{some}")
    people = all(domain.known_pids is not None for domain in domains)
    a_person = ", a column of a domain one person: what differs down it is the camera" if people else ""
    return montage(lines, title="The domains by camera", subtitle=f"{'; '.join(about)}. A line is a camera{a_person}.")


def draw_style_copies(domain: Domain, read_copy: ReadCopy, *, count: int = 6, seed: int = 0) -> Figure:
    """One line a picture, from each camera in turn: the original, then its copy in each other camera's style.

    `read_copy(row, camera)` gives the copy, or None where there is none; it is not asked for a picture's own camera.
    """
    camids, cameras = np.asarray(domain.camids), domain.shown_cameras()
    people = np.arange(len(camids)) if domain.known_pids is None else domain.known_pids
    order = np.random.default_rng(seed).permutation(len(camids))
    lines, seen = [], set()

    def copy(row: int, camera: int) -> Cell:
        if camera == camids[row]:
            return Cell(words="its own\ncamera")
        return Cell(words="no copy") if (found := read_copy(row, camera)) is None else Cell(found)

    for turn in range(count):
        of_camera = [row for row in order[camids[order] == cameras[turn % len(cameras)]] if people[row] not in seen]
        for row in map(int, of_camera[:1]):
            seen.add(people[row])
            cells = [Cell(domain.read(row), "", "query"), *(copy(row, camera) for camera in cameras)]
            lines.append(Row(f"camera {camids[row]}", cells))
    subtitle = "Each original, and its copies in the style of the other cameras."
    heads = ["original", *(f"cam {camera}" for camera in cameras)]
    return montage(lines, title=f"Style copies: {domain.name}", subtitle=subtitle, heads=heads)


def draw_clusters(labels: np.ndarray, domain: Domain, *, count: int = 3, members: int = 10) -> Figure:
    """The largest clusters, the smallest and the most mixed, one a line; people who are split; outliers.

    Args:
        labels: (n,) the cluster of each picture of `domain`; below 0: an outlier.
        domain: the pictures. Where people are known, a cluster is the more mixed the less its most frequent person has
            of it, and the people whose pictures are in most clusters are shown as split; else, the more of its pairs
            are by two cameras.
        count: lines of each kind; equals by number.
        members: pictures of a line; of more, some of every part in order of people (or clusters) and cameras.
    """
    pids, camids = domain.known_pids, np.asarray(domain.camids)
    people = np.full(len(labels), NOBODY) if pids is None else pids
    clusters, persons = _rows_of(labels), _rows_of(people)

    def mixing(cluster: int) -> float:
        rows = clusters[cluster]
        if pids is None:
            return cross_camera_share(np.zeros(len(rows), dtype=np.int64), camids[rows])
        known = people[rows][people[rows] >= 0]
        return 1 - np.unique(known, return_counts=True)[1].max() / len(known) if len(known) else 0.0

    by_size = sorted(clusters, key=lambda cluster: -len(clusters[cluster]))
    chosen = {"large": by_size[:count], "small": by_size[count:][::-1][:count]}
    rest = [cluster for cluster in clusters if cluster not in chosen["large"] + chosen["small"] and mixing(cluster) > 0]
    chosen["mixed"] = sorted(rest, key=lambda cluster: -mixing(cluster))[:count]
    lines = [
        _members(domain, [kind, f"cluster {cluster}"], clusters[cluster], people, ("person", "people"), members)
        for kind, of_kind in chosen.items()
        for cluster in of_kind
    ]
    parts = {person: len(_rows_of(labels[rows])) for person, rows in persons.items()}
    split = sorted((person for person in parts if parts[person] > 1), key=lambda person: -parts[person])
    for person in split[:count]:
        rows = persons[person]
        lines.append(_members(domain, ["split", f"person {person}"], rows, labels, ("cluster", "clusters"), members))
    if len(outliers := np.flatnonzero(labels < 0)):
        lines.append(_members(domain, ["outliers"], outliers, people, ("person", "people"), members))
    subtitle = (
        f"{len(clusters):,} clusters of {len(labels):,} pictures; {len(outliers):,} of these are outliers, in none."
    )
    if pids is not None:
        pure = sum(len(_rows_of(people[rows])) == 1 for rows in clusters.values())
        subtitle += (
            f" {pure:,} clusters show one person alone; {len(split):,} of {len(persons):,} people are in several "
            "clusters. Frames of one colour in a line: one person; in a line of a split person: one cluster."
        )
    return montage(lines, title="Clusters", subtitle=subtitle)


def _rows_of(groups: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each group, in order of the groups' numbers; those below 0 are none."""
    return {group: np.flatnonzero(groups == group) for group in np.unique(groups[groups >= 0]).tolist()}


def _members(
    domain: Domain, facts: list[str], rows: np.ndarray, parts: np.ndarray, nouns: tuple[str, str], members: int
) -> Row:
    """A line of at most `members` of the pictures `rows`, framed by their `parts` (n,), the most frequent first."""
    sizes = Counter(part for part in parts[rows].tolist() if part >= 0)
    place_of = {part: place for place, (part, _) in enumerate(sizes.most_common())}
    order = sorted(rows.tolist(), key=lambda row: (place_of.get(int(parts[row]), len(rows)), domain.camids[row]))
    cells = []
    for at in np.linspace(0, len(order) - 1, min(members, len(order))).round().astype(int):
        row, part = order[at], int(parts[order[at]])
        color = [*PEOPLE, *[FAINT_INK] * len(rows)][place_of[part]] if part in place_of else "none"
        name = f"{nouns[0]} {part}\n" if part in place_of else "outlier\n" if nouns[0] == "cluster" else ""
        cells.append(Cell(domain.read(row), f"{name}cam {domain.camids[row]}", color=color))
    counts = [(len(rows), "picture", "pictures"), (len(np.unique(domain.camids[rows])), "camera", "cameras")]
    counts += [(len(sizes), *nouns)] if sizes else []
    return Row("\n".join(facts + [f"{number:,} {one if number == 1 else many}" for number, one, many in counts]), cells)


def pick_by_camera(
    camids: np.ndarray, pids: np.ndarray | None, cameras: Sequence[int], count: int, seed: int
) -> np.ndarray:
    """(cameras, count) rows to show, `NO_PICTURE` where there is none: any, or with pids a column of each person.

    Persons whom most of `cameras` have seen come first, equals in a random order.
    """
    rows = np.full((len(cameras), count), NO_PICTURE, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(camids))
    if pids is None:
        for line, camera in enumerate(cameras):
            of_camera = order[camids[order] == camera][:count]
            rows[line, : len(of_camera)] = of_camera
        return rows
    seen: dict[int, dict[int, int]] = {}
    for row in order[pids[order] >= 0].tolist():
        seen.setdefault(int(pids[row]), {}).setdefault(int(camids[row]), row)
    people = sorted(seen.values(), key=lambda by_camera: -sum(camera in by_camera for camera in cameras))  # stable
    for column, by_camera in enumerate(people[:count]):
        rows[:, column] = [by_camera.get(camera, NO_PICTURE) for camera in cameras]
    return rows
