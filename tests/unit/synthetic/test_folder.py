"""Folders of synthetic domains: what is in them, and what their bytes depend on."""

import hashlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ecn_dist.errors import UserError
from ecn_dist.synthesize import main
from ecn_dist.synthetic import SOURCE, TARGET, DomainSize, folder, pids_of, write_domain

SMALL: dict[str, Any] = {
    "seed": 3,
    "train_identities": 3,
    "test_identities": 2,
    "cameras": 2,
    "pictures_per_camera": 2,
    "height": 32,
    "width": 16,
}
PARTS = ("bounding_box_train", "bounding_box_test", "query")


def write(folder: Path, spec: Any, workers: int = 1, **changes: Any) -> int:
    """`write_domain` of the small domain, changed."""
    size = SMALL | changes
    seed = size.pop("seed")
    return write_domain(folder, spec, DomainSize(**size), seed=seed, workers=workers)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> checksum, of the pictures."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.jpg")
    }


def test_folder_is_laid_out_as_market(tmp_path: Path) -> None:
    assert write(tmp_path / "a", TARGET) == 20
    names = {part: sorted(path.name for path in (tmp_path / "a" / part).iterdir()) for part in PARTS}
    assert {part: len(files) for part, files in names.items()} == {PARTS[0]: 12, PARTS[1]: 4, PARTS[2]: 4}
    pattern = re.compile(r"(\d{4,})_c(\d+)s\d_\d{6}_\d{2}\.jpg")
    seen = {
        part: [tuple(map(int, pattern.fullmatch(name).groups())) for name in files] for part, files in names.items()
    }  # type: ignore[union-attr]
    train, gallery, query = (seen[part] for part in PARTS)
    assert {pid for pid, _ in train}.isdisjoint({pid for pid, _ in query})
    assert sorted(query) == sorted(set(query)) == sorted(set(gallery)), "one query per identity and camera"
    assert {camera for _, camera in train} == {1, 2}
    with Image.open(next((tmp_path / "a" / "query").iterdir())) as picture:
        assert (picture.size, picture.mode, picture.format) == ((16, 32), "RGB", "JPEG")


def test_bytes_do_not_depend_on_workers_or_on_what_else_is_drawn(tmp_path: Path) -> None:
    write(tmp_path / "one", TARGET)
    write(tmp_path / "two", TARGET, workers=2)
    write(tmp_path / "more", TARGET, train_identities=4, pictures_per_camera=3)
    one, more = digests(tmp_path / "one"), digests(tmp_path / "more")
    assert one == digests(tmp_path / "two")
    assert one.items() <= more.items()
    assert len(set(more.values())) == len(more), "no picture comes twice"


def test_validation_changes_only_query_and_gallery(tmp_path: Path) -> None:
    write(tmp_path / "test", TARGET)
    write(tmp_path / "validation", TARGET, test_split="validation")
    test, validation = digests(tmp_path / "test"), digests(tmp_path / "validation")
    train = {name for name in test if name.startswith(PARTS[0])}
    assert {name: validation[name] for name in train} == {name: test[name] for name in train}
    assert set(test) & set(validation) == train
    assert set(pids_of("train", 50)) | set(pids_of("test", 50)) | set(pids_of("validation", 50)) == set(range(1, 151))


def test_same_call_again_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    write(folder, SOURCE)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write(folder, SOURCE) == 20
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="already holds something else"):
        write(folder, SOURCE, seed=4)


def test_interrupted_writing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(UserError, match=r"cannot write .* disk full"):
            write(tmp_path / "a", SOURCE)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a", SOURCE)
    assert len(digests(tmp_path / "a")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": 1}, "no true match"),
        ({"pictures_per_camera": 1}, "no true match"),
        ({"cameras": 0}, "at least one camera"),
        ({"height": 4}, "at least 16 x 8"),
        ({"seed": -1}, "seed .* is 0 to .*, not -1"),
        ({"seed": 2**63}, "seed .* is 0 to"),
        ({"train_identities": -1}, "0 or more"),
    ],
)
def test_senseless_sizes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "a", SOURCE, **change)
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--domain source --train_identities 1 --test_identities 1 --cameras 2 --pictures_per_camera 2 --workers 1"
    arguments = [*options.split(), "--height", "32", "--width", "16", "--output", str(tmp_path / "s")]
    assert main(arguments) == 0
    assert "8 pictures of source" in capsys.readouterr().out
    assert len(digests(tmp_path / "s")) == 8
    assert main([*arguments, "--seed", "1"]) == 2
    assert "already holds" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_draw", kill_worker)
    with pytest.raises(UserError, match="worker processes ended unexpectedly"):
        write(tmp_path / "a", SOURCE, workers=2)
    assert list(tmp_path.iterdir()) == []


def kill_worker(job: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
