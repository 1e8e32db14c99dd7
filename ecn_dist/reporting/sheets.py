"""The sheets of pictures of a run, each a montage: which pictures stand where, and what is written at them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.clustering.quality import cross_camera_share
from ecn_dist.reporting.montage import FAINT_INK, LEGEND, Cell, Row, montage
from ecn_dist.reporting.ranked import Match, RankedList

ReadPicture = Callable[[int], Image.Image]
Answer = tuple[str, float, Image.Image]  # name, distance, picture

NO_PICTURE = -1
MAX_CAMERAS = 8  # more do not fit a page
FAILURES_A_LINE = 3
PEOPLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00")  # frames of people in a cluster
_PLURALS = {"person": "people", "true match": "true matches"}


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain, by row; pids below 0 are not known."""

    name: str
    camids: np.ndarray
    read: ReadPicture
    pids: np.ndarray

    @property
    def has_people(self) -> bool:
        return bool((self.pids >= 0).any())

    def shown_cameras(self) -> list[int]:
        """At most MAX_CAMERAS of its cameras, evenly spaced."""
        return _evenly(np.unique(self.camids).tolist(), MAX_CAMERAS)


def _evenly(items: Sequence[int], most: int) -> list[int]:
    return [items[at] for at in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun if number == 1 else _PLURALS.get(noun, f'{noun}s')}"


def draw_ranked_lists(
    lists: Sequence[RankedList], read_query: ReadPicture, read_gallery: ReadPicture, title: str, subtitle: str
) -> Figure:
    """One row a query, with its nearest gallery pictures; `read_query` and `read_gallery` read by row of the whole."""
    rows = []
    for ranked in lists:
        facts = [f"query {ranked.query}"] + [f"camera {ranked.camid}"] * (ranked.camid is not None)
        facts += [f"AP {100 * ranked.average_precision:.1f} %", _counted(ranked.num_right, "true match")]
        facts += [f"first at rank {ranked.first_right.rank:,}"] if ranked.first_right else []
        answers = [_answer(match, read_gallery) for match in ranked.matches]
        rows.append(Row("\n".join(facts), [Cell(read_query(ranked.query), "query", "query"), *answers]))
    rows = rows or [Row("", [Cell(words="No query has a true match.")])]
    return montage(rows, title=title, subtitle=f"{subtitle} {LEGEND}")


def draw_failures(
    lists: Sequence[RankedList], read_query: ReadPicture, read_gallery: ReadPicture, subtitle: str
) -> Figure:
    """For each query whose first answer is wrong: it, that answer, and the true match that should have been first."""
    blocks: list[list[Cell]] = []
    for ranked in lists:
        if ranked.matches and not ranked.matches[0].right and ranked.first_right:
            words = f"query {ranked.query}\nAP {100 * ranked.average_precision:.1f} %"
            pair = (_answer(match, read_gallery) for match in (ranked.matches[0], ranked.first_right))
            blocks.append([Cell(read_query(ranked.query), words, "query"), *pair, Cell()])
    blocks = blocks or [[Cell(words="None among these queries: a true match came first every time."), Cell()]]
    lines = (blocks[at : at + FAILURES_A_LINE] for at in range(0, len(blocks), FAILURES_A_LINE))
    rows = [Row("", [*chain(*line)][:-1]) for line in lines]
    return montage(rows, title="Failures", subtitle=f"{subtitle} {LEGEND}")


def _answer(match: Match, read: ReadPicture) -> Cell:
    words = f"{match.rank:,}" if match.camid is None else f"{match.rank:,} · cam {match.camid}"
    return Cell(read(match.row), words, "right" if match.right else "wrong")


def draw_answers(queries: Sequence[tuple[str, Image.Image, Sequence[Answer]]], subtitle: str = "") -> Figure:
    """One row a query of unknown people: its name and picture, then each answer's, with rank, distance and name."""

    def short(name: str) -> str:
        return name if len(name) <= 16 else "…" + name[-15:]

    rows = []
    for name, picture, answers in queries:
        cells = [Cell(shown, f"{at}: {far:.3f}\n{short(of)}") for at, (of, far, shown) in enumerate(answers, start=1)]
        rows.append(Row("", [Cell(picture, f"query\n{short(name)}", "query"), *cells]))
    return montage(rows, title="Nearest pictures", subtitle=subtitle)


def draw_domains(domains: Sequence[Domain], per_camera: int = 10) -> Figure:
    """One domain after another, one line a camera; where pids are known, one column of a domain is one person."""
    lines, about = [], []
    for domain in domains:
        cameras, of_all = domain.shown_cameras(), len(np.unique(domain.camids))
        for camera, rows in zip(cameras, pick_by_camera(domain, cameras, per_camera).tolist(), strict=True):
            cells = [Cell() if row == NO_PICTURE else Cell(domain.read(row)) for row in rows]
            lines.append(Row(f"{domain.name}\ncamera {camera}", cells))
        some = f" ({len(cameras)} of {of_all} cameras shown)" if of_all > len(cameras) else ""
        about.append(f"{domain.name}: {len(domain.camids):,} pictures{some}")
    people = all(domain.has_people for domain in domains)
    a_person = ", a column of a domain one person: what differs down it is the camera" if people else ""
    return montage(lines, title="The domains by camera", subtitle=f"{'; '.join(about)}. A line is a camera{a_person}.")


def draw_style_copies(domain: Domain, read_copy: Callable[[int, int], Image.Image], count: int = 6) -> Figure:
    """One line a picture, from each camera in turn: the original, then its copy in each other camera's style.

    `read_copy(row, camera)` gives the copy; it is not asked for a picture's own camera.
    """
    cameras = domain.shown_cameras()
    people = domain.pids if domain.has_people else np.arange(len(domain.camids))
    order = np.random.default_rng(0).permutation(len(people))
    lines, seen = [], set()
    for turn in range(count):
        own = cameras[turn % len(cameras)]
        row = next((row for row in order[domain.camids[order] == own].tolist() if people[row] not in seen), None)
        if row is not None:
            seen.add(people[row])
            copies = [Cell(words="its own\ncamera") if of == own else Cell(read_copy(row, of)) for of in cameras]
            lines.append(Row(f"camera {own}", [Cell(domain.read(row), "", "query"), *copies]))
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
    clusters, persons, outliers = _rows_of(labels), _rows_of(domain.pids), np.flatnonzero(labels < 0)

    def mixing(cluster: int) -> float:
        rows = clusters[cluster]
        if not domain.has_people:
            return cross_camera_share(np.zeros(len(rows), dtype=np.int64), domain.camids[rows])
        known = domain.pids[rows][domain.pids[rows] >= 0]
        return 1 - np.unique(known, return_counts=True)[1].max() / len(known) if len(known) else 0.0

    by_size = sorted(clusters, key=lambda cluster: -len(clusters[cluster]))
    chosen = {"large": by_size[:count], "small": by_size[count:][::-1][:count]}
    rest = [cluster for cluster in clusters if cluster not in chosen["large"] + chosen["small"] and mixing(cluster) > 0]
    chosen["mixed"] = sorted(rest, key=lambda cluster: -mixing(cluster))[:count]
    shown = [(f"{kind}\ncluster {at}", clusters[at], "person") for kind, these in chosen.items() for at in these]
    parts = {person: len(_rows_of(labels[rows])) for person, rows in persons.items()}
    split = sorted((person for person in parts if parts[person] > 1), key=lambda person: -parts[person])
    shown += [(f"split\nperson {person}", persons[person], "cluster") for person in split[:count]]
    shown += [("outliers", outliers, "person")] if len(outliers) else []
    subtitle = f"{len(clusters):,} clusters of {len(labels):,} pictures; {len(outliers):,} of these are outliers."
    if domain.has_people:
        pure = sum(len(_rows_of(domain.pids[rows])) == 1 for rows in clusters.values())
        subtitle += (
            f" {pure:,} clusters show one person alone; {len(split):,} of {len(persons):,} people are in several "
            "clusters. Frames of one colour in a line: one person; in a line of a split person: one cluster."
        )
    lines = [
        _members(domain, words, rows, domain.pids if noun == "person" else labels, noun, members)
        for words, rows, noun in shown
    ]
    return montage(lines, title="Clusters", subtitle=subtitle)


def _rows_of(groups: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each group, in order of the groups' numbers; those below 0 are none."""
    return {group: np.flatnonzero(groups == group) for group in np.unique(groups[groups >= 0]).tolist()}


def _members(domain: Domain, words: str, rows: np.ndarray, parts: np.ndarray, noun: str, members: int) -> Row:
    """A line of at most `members` of the pictures `rows`, framed by their `parts` (n,), the most frequent first."""
    sizes = Counter(part for part in parts[rows].tolist() if part >= 0)
    place_of = {part: place for place, (part, _) in enumerate(sizes.most_common())}
    order = sorted(rows.tolist(), key=lambda row: (place_of.get(int(parts[row]), len(rows)), domain.camids[row]))
    cells = []
    for row in _evenly(order, members):
        name, color = "outlier\n" * (noun == "cluster"), "none"
        if (place := place_of.get(int(parts[row]))) is not None:
            name, color = f"{noun} {parts[row]}\n", PEOPLE[place] if place < len(PEOPLE) else FAINT_INK
        cells.append(Cell(domain.read(row), f"{name}cam {domain.camids[row]}", color=color))
    counts = [_counted(len(rows), "picture"), _counted(len(np.unique(domain.camids[rows])), "camera")]
    return Row("\n".join([words, *counts, *[_counted(len(sizes), noun)] * bool(sizes)]), cells)


def pick_by_camera(domain: Domain, cameras: Sequence[int], count: int) -> np.ndarray:
    """(cameras, count) rows to show, `NO_PICTURE` where there is none: any, or with pids a column of each person.

    Persons whom most of `cameras` have seen come first, equals in a random order.
    """
    picked = np.full((len(cameras), count), NO_PICTURE, dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(domain.camids))
    if not domain.has_people:
        for line, camera in zip(picked, cameras, strict=True):
            of_camera = order[domain.camids[order] == camera][:count]
            line[: len(of_camera)] = of_camera
        return picked
    seen: dict[int, dict[int, int]] = {}
    for row in order[domain.pids[order] >= 0].tolist():
        seen.setdefault(int(domain.pids[row]), {}).setdefault(int(domain.camids[row]), row)
    people = sorted(seen.values(), key=lambda by_camera: -sum(camera in by_camera for camera in cameras))  # stable
    for column, by_camera in enumerate(people[:count]):
        picked[:, column] = [by_camera.get(camera, NO_PICTURE) for camera in cameras]
    return picked
