"""embed and search: the feature file, and the two commands."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ecn_dist import Embedder, embed, search
from ecn_dist.errors import UserError
from ecn_dist.serving.feature_file import FeatureFile
from tests.trained_cases import write_pictures, write_trained_run


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, pictures/ (with a folder below, and files that are no pictures) and the feature file."""
    folder = tmp_path_factory.mktemp("search")
    write_trained_run(folder / "run")
    write_pictures(folder / "pictures", 5)
    write_pictures(folder / "pictures" / "überwacht", 4, seed=1)
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "pictures" / "._000.jpg").write_bytes(b"left by an archive")
    command = ["--checkpoint", str(folder / "run"), "--input", str(folder / "pictures"), "--device", "cpu"]
    assert embed.main([*command, "--output", str(folder / "gallery.safetensors"), "--batch_size", "4"]) == 0
    return folder


NAMES = [f"{n:03d}.jpg" for n in range(5)] + [f"überwacht/{n:03d}.jpg" for n in range(4)]


def test_the_feature_file(case: Path) -> None:
    found = FeatureFile.read(case / "gallery.safetensors")
    embedder = Embedder.load(case / "run", device="cpu")
    assert list(found.files) == NAMES
    assert (found.model, found.folder) == (embedder.fingerprint, "pictures")
    paths = [case / "pictures" / name for name in NAMES]
    np.testing.assert_array_equal(found.features, embedder(paths, batch_size=4))
    assert [row.tobytes() for row in found.sha256] == [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    assert not list(case.glob(".*"))


def test_feature_files_open_without_this_project(case: Path) -> None:
    code = """
import json, sys
from safetensors import safe_open
with safe_open("gallery.safetensors", framework="numpy") as file:
    features, sha256 = file.get_tensor("features"), file.get_tensor("sha256")
    names = json.loads(file.metadata()["files"])
assert "torch" not in sys.modules and "ecn_dist" not in sys.modules
print(len(names), sha256[0].tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=case, capture_output=True, text=True, timeout=60)
    first = hashlib.sha256((case / "pictures" / NAMES[0]).read_bytes()).hexdigest()
    assert done.stdout.split() == ["9", first], done.stderr


def test_damaged_feature_files(case: Path, tmp_path: Path) -> None:
    data = (case / "gallery.safetensors").read_bytes()
    for name, damaged in (("cut", data[: len(data) // 2]), ("empty", b""), ("text", b"no features")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is no file of features"):
            FeatureFile.read(path)
    with pytest.raises(UserError, match="there is no file of features"):
        FeatureFile.read(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("tensors", "about", "said"),
    [
        ({"features": np.zeros((2, 4), np.float32)}, {}, "the feature of row 0 is of length 0, not 1"),
        ({"features": np.full((2, 4), np.nan, np.float32)}, {}, "the feature of row 0 is of length nan"),
        ({"features": np.full((2, 4), 0.5)}, {}, "features float64"),
        ({"features": np.full((3, 4), 0.5, np.float32)}, {}, r"\(3, 4\) for 2 names"),
        ({"sha256": np.zeros((2, 31), np.uint8)}, {}, "sha256 uint8"),
        ({}, {"files": '["a.jpg", 7]'}, "not all names of files"),
        ({}, {"files": '["a.jpg", "b\\u0000.jpg"]'}, "not all names of files"),
        ({}, {"files": "7"}, "not iterable"),
        ({}, {"files": "[" * 100_000}, "is no file of features"),
        ({}, {"version": "2"}, "format 'ecn_dist features' 2, not 'ecn_dist features' 1"),
        ({}, {"format": "another"}, "'another' 1, not"),
    ],
)
def test_feature_files_that_are_not_ours(
    tmp_path: Path, tensors: dict[str, np.ndarray], about: dict[str, str], said: str
) -> None:
    ours = {"features": np.full((2, 4), 0.5, np.float32), "sha256": np.zeros((2, 32), np.uint8)}
    known = {"format": "ecn_dist features", "version": "1", "model": "m", "folder": "f", "files": '["a.jpg", "b.jpg"]'}
    path = tmp_path / "f.safetensors"
    save_file(ours, path, known)
    assert FeatureFile.read(path).files == ("a.jpg", "b.jpg")
    save_file(ours | tensors, path, known | about)
    with pytest.raises(UserError, match=said):
        FeatureFile.read(path)


def search_options(case: Path, *more: str) -> list[str]:
    query, gallery = str(case / "pictures" / NAMES[6]), str(case / "gallery.safetensors")
    run = str(case / "run")
    return ["--checkpoint", run, "--query", query, "--gallery", gallery, "--device", "cpu", *more]


def test_search_prints_and_draws(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "out.png"
    capsys.readouterr()
    assert search.main(search_options(case, "--top", "3", "--draw", str(sheet))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(NAMES[6])
    ranks, distances, names = zip(*(line.split() for line in lines[1:4]), strict=True)
    assert ranks == ("1", "2", "3")
    assert (names[0], distances[0]) == (NAMES[6], "0.0000")
    assert sorted(distances) == list(distances)
    assert len(lines) == 5
    with Image.open(sheet) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000, "the pictures are on it"


def test_search_is_the_definition(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against float64; equal distances in gallery order, and lengths that half precision leaves do not count."""
    found = FeatureFile.read(case / "gallery.safetensors")
    features = found.features[[0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 6]]
    scale = np.random.default_rng(0).uniform(0.99, 1.01, (len(features), 1)).astype(np.float32)
    names = (*found.files, "b.jpg", "a.jpg")
    gallery = tmp_path / "gallery.safetensors"
    dataclasses.replace(found, features=features * scale, files=names, sha256=found.sha256[[*range(9), 6, 6]]).write(
        gallery
    )
    capsys.readouterr()
    assert search.main(search_options(case, "--gallery", str(gallery), "--top", "100")) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    distances = np.linalg.norm(features.astype(np.float64) - features[6].astype(np.float64), axis=1)
    order = np.argsort(np.round(distances, 5), kind="stable")
    assert [line[2] for line in printed] == [names[row] for row in order]
    np.testing.assert_allclose([float(line[1]) for line in printed], distances[order], atol=1e-4)


def test_names_of_a_foreign_file_are_shown_harmless(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = FeatureFile.read(case / "gallery.safetensors")
    forged = ("\x1b]0;PWNED\x07\x1b[2J.jpg", "a.jpg\n     1  0.0000  forged.jpg", *found.files[2:])
    dataclasses.replace(found, files=forged).write(tmp_path / "forged.safetensors")
    capsys.readouterr()
    assert search.main(search_options(case, "--gallery", str(tmp_path / "forged.safetensors"))) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 10
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"\x1b]0;PWNED\x07\x1b[2J.jpg" in shown


@pytest.mark.parametrize("dtype", [b"I8", b"F8_E4M3", b"F8_E5M2", b"X"])
def test_numbers_of_another_kind(case: Path, tmp_path: Path, dtype: bytes) -> None:
    data = (case / "gallery.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U8"', b'"' + dtype + b'"')
    path = tmp_path / "gallery.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(UserError, match=r"gallery\.safetensors: is no file of features"):
        FeatureFile.read(path)


def test_a_foreign_file_may_name_what_is_no_picture(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, secret = FeatureFile.read(case / "gallery.safetensors"), case / "run" / "config.yaml"
    sha256 = found.sha256.copy()
    sha256[:] = np.frombuffer(hashlib.sha256(secret.read_bytes()).digest(), dtype=np.uint8)
    gallery = tmp_path / "gallery.safetensors"
    dataclasses.replace(found, files=(str(secret),) * len(found.files), sha256=sha256).write(gallery)
    options = search_options(case, "--gallery", str(gallery), "--draw", str(tmp_path / "out.png"))
    assert search.main(options) == 2
    assert f"--draw: {secret} cannot be decoded as a picture" in capsys.readouterr().err


def test_mistakes_of_a_search(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str) -> str:
        assert search.main(search_options(case, *more)) == 2
        return capsys.readouterr().err

    other = write_trained_run(tmp_path / "other", seed=1)
    assert "another model" in error("--checkpoint", str(other))
    assert "nowhere.jpg" in error("--query", "nowhere.jpg")
    assert "must end in .png" in error("--draw", "out.pdf")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--pictures" in error("--draw", str(tmp_path / "out.png"), "--pictures", str(empty))
    write_pictures(empty, 5, seed=9)
    write_pictures(empty / "überwacht", 4, seed=9)
    assert "is not the picture that was embedded" in error(
        "--draw", str(tmp_path / "out.png"), "--pictures", str(empty)
    )
    assert not (tmp_path / "out.png").exists()


def test_mistakes_of_embed(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(folder: Path, output: Path) -> str:
        options = ["--checkpoint", str(case / "run"), "--input", str(folder), "--output", str(output)]
        assert embed.main([*options, "--device", "cpu"]) == 2
        return capsys.readouterr().err

    bad = tmp_path / "bad"
    write_pictures(bad, 3)
    (bad / "001.jpg").write_bytes(b"no picture")
    assert f"{bad / '001.jpg'}: cannot be decoded" in error(bad, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert "there is no folder" in error(tmp_path / "missing", tmp_path / "out.safetensors")
    assert "no pictures below" in error(case / "run", tmp_path / "out.safetensors")
    assert "written as .safetensors" in error(case / "pictures", tmp_path / "out.pkl")
    assert "make it first" in error(case / "pictures", tmp_path / "missing" / "out.safetensors")


def test_linked_folders_are_embedded_too(case: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_pictures(folder / "cam0", 1)
    write_pictures(tmp_path / "nas", 2)
    (folder / "cam1").symlink_to(tmp_path / "nas")
    (folder / "cam2").symlink_to("../nas")
    os.mkfifo(folder / "waits.jpg")
    (tmp_path / "nas" / "back").symlink_to(folder)
    pictures, left_out = embed.find_pictures(folder)
    assert pictures == ["cam0/000.jpg", "cam1/000.jpg", "cam1/001.jpg"]  # each folder once
    assert [name.partition(" ")[0] for name in left_out] == ["cam1/back", "cam2", "waits.jpg"]


def test_a_link_that_leads_nowhere_is_named(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "d", 1)
    (tmp_path / "d" / "lost.jpg").symlink_to("elsewhere.jpg")
    options = ["--checkpoint", str(case / "run"), "--input", str(tmp_path / "d"), "--device", "cpu"]
    assert embed.main([*options, "--output", str(tmp_path / "out.safetensors")]) == 2
    assert "lost.jpg: cannot be read: No such file" in capsys.readouterr().err
