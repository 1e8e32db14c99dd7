"""embed and search: the feature file, exact nearest pictures, FAISS beside them, and the two commands."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecn_dist import Embedder, embed, search
from ecn_dist.errors import UserError
from ecn_dist.ranking.nearest import ExactSearch, FaissSearch, check_features, nearest
from ecn_dist.serving.feature_file import FeatureFile
from tests.trained_cases import write_pictures, write_trained_run


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def by_definition(gallery: np.ndarray, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.linalg.norm(gallery.astype(np.float64) - query, axis=1)
    order = np.lexsort((np.arange(len(gallery)), distances))[:top]
    return order, distances[order]


def hard_gallery(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features with many equal rows, and rows that differ from each other by float32's last bits."""
    rng = np.random.default_rng(seed)
    gallery = unit(rng, 300, 48)
    gallery[100:200] = gallery[rng.integers(0, 100, 100)]
    gallery[200:220] = unit(rng, 48)
    gallery[220:260] = unit(rng, 48) + rng.standard_normal((40, 48)).astype(np.float32) * 1e-7
    queries = np.concatenate([unit(rng, 6, 48), gallery[[3, 205, 230]]])
    return gallery, queries


@pytest.fixture(params=["exact", "faiss"])
def index(request: pytest.FixtureRequest) -> type[ExactSearch | FaissSearch]:
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="needs the extra `search` (faiss-cpu)")
        return FaissSearch
    return ExactSearch


@pytest.mark.parametrize("seed", range(10))
def test_nearest_is_the_definition(index: type[ExactSearch | FaissSearch], seed: int) -> None:
    gallery, queries = hard_gallery(seed)
    made = index(gallery)
    for top in (1, 7, 25, 299, 300, 1000):
        normal = check_features("query", queries)
        for query, matches in zip(normal, nearest(made, queries, top), strict=True):
            rows, distances = by_definition(made.gallery, query, top)
            np.testing.assert_array_equal(matches.rows, rows)
            np.testing.assert_array_equal(matches.distances, distances)


def test_faiss_flat_equals_the_exact_search() -> None:
    pytest.importorskip("faiss", reason="needs the extra `search` (faiss-cpu)")
    for seed in range(10):
        gallery, queries = hard_gallery(seed)
        for top in (1, 10, 60, 300):
            exact, faiss = (nearest(kind(gallery), queries, top) for kind in (ExactSearch, FaissSearch))
            for one, other in zip(exact, faiss, strict=True):
                np.testing.assert_array_equal(one.rows, other.rows)
                np.testing.assert_array_equal(one.distances, other.distances)


def test_faiss_indexes_that_approximate() -> None:
    pytest.importorskip("faiss", reason="needs the extra `search` (faiss-cpu)")
    rng = np.random.default_rng(0)
    gallery = unit(rng, 500, 16)
    exact = nearest(ExactSearch(gallery), gallery[:50], 5)
    for factory in ("HNSW16", "IVF4,Flat"):
        found = nearest(FaissSearch(gallery, factory), gallery[:50], 5)
        same = np.mean([np.isin(a.rows, b.rows).mean() for a, b in zip(exact, found, strict=True)])
        assert same > 0.6
        assert all(matches.distances[0] < 1e-6 for matches in found)
    with pytest.raises(UserError, match="no such index"):
        FaissSearch(gallery, "Nonsense")


def test_features_that_cannot_be_compared() -> None:
    gallery, queries = hard_gallery(0)
    with pytest.raises(UserError, match="two models"):
        nearest(ExactSearch(gallery), queries[:, :40] / np.linalg.norm(queries[:, :40], axis=1, keepdims=True), 1)
    gallery[17] *= 3
    with pytest.raises(UserError, match=r"row 17 is 3"):
        ExactSearch(gallery)
    gallery[17] = np.nan
    with pytest.raises(UserError, match=r"row 17 is nan"):
        ExactSearch(gallery)
    with pytest.raises(UserError, match="--top: 0"):
        nearest(ExactSearch(queries), queries, 0)


def test_roughly_normal_features_rank_as_normal_ones() -> None:
    """Features of half precision are not quite of unit length; the longer are not nearer for that."""
    gallery, queries = hard_gallery(1)
    scale = np.random.default_rng(0).uniform(0.99, 1.01, (len(gallery), 1)).astype(np.float32)
    one = nearest(ExactSearch(gallery[:100]), queries[:6], 20)
    other = nearest(ExactSearch(gallery[:100] * scale[:100]), queries[:6], 20)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, pictures/ (with a folder below, and files that are no pictures) and the feature files of both forms."""
    folder = tmp_path_factory.mktemp("search")
    write_trained_run(folder / "run")
    write_pictures(folder / "pictures", 5)
    write_pictures(folder / "pictures" / "überwacht", 4, seed=1)
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "pictures" / "._000.jpg").write_bytes(b"left by an archive")
    for suffix in ("npz", "safetensors"):
        output = str(folder / f"gallery.{suffix}")
        command = ["--checkpoint", str(folder / "run"), "--input", str(folder / "pictures"), "--device", "cpu"]
        assert embed.main([*command, "--output", output, "--batch_size", "4"]) == 0
    return folder


NAMES = [f"{n:03d}.jpg" for n in range(5)] + [f"überwacht/{n:03d}.jpg" for n in range(4)]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_the_feature_file(case: Path, suffix: str) -> None:
    found = FeatureFile.read(case / f"gallery.{suffix}")
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
import numpy as np
from safetensors import safe_open
with safe_open("gallery.safetensors", framework="numpy") as file:
    features, sha256 = file.get_tensor("features"), file.get_tensor("sha256")
    names = json.loads(file.metadata()["files"])
arrays = np.load("gallery.npz", allow_pickle=False)
assert arrays["files"].tolist() == names and np.array_equal(arrays["features"], features)
assert np.array_equal(arrays["sha256"], sha256) and json.loads(str(arrays["about"]))["version"] == "1"
assert "torch" not in sys.modules and "ecn_dist" not in sys.modules
print(len(names), sha256[0].tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=case, capture_output=True, text=True, timeout=60)
    first = hashlib.sha256((case / "pictures" / NAMES[0]).read_bytes()).hexdigest()
    assert done.stdout.split() == ["9", first], done.stderr


def test_damaged_feature_files(case: Path, tmp_path: Path) -> None:
    for suffix in ("npz", "safetensors"):
        data = (case / f"gallery.{suffix}").read_bytes()
        for name, damaged in (("cut", data[: len(data) // 2]), ("empty", b""), ("text", b"no features")):
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="is no file of features"):
                FeatureFile.read(path)
    np.savez(tmp_path / "other.npz", about=np.array(json.dumps({"format": "another"})))
    np.savez(tmp_path / "pickle.npz", about=np.array([{"format": "another"}], dtype=object))
    for name in ("other.npz", "pickle.npz"):
        with pytest.raises(UserError, match="is no file of features"):
            FeatureFile.read(tmp_path / name)
    with pytest.raises(UserError, match="there is no file of features"):
        FeatureFile.read(tmp_path / "missing.npz")


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
        assert picture.text["Title"] == "Nearest pictures"
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000, "the pictures are on it"


def test_search_with_faiss_prints_the_same(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="needs the extra `search` (faiss-cpu)")
    capsys.readouterr()
    printed = []
    for index in ("exact", "faiss", "faiss:Flat"):
        assert search.main(search_options(case, "--index", index)) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert len(printed[0].splitlines()) == 10


def test_search_without_faiss(case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if not installed
    assert search.main(search_options(case, "--index", "faiss")) == 2
    assert "pip install 'ecn_dist[search]'" in capsys.readouterr().err


def test_mistakes_of_a_search(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str) -> str:
        assert search.main(search_options(case, *more)) == 2
        return capsys.readouterr().err

    other = write_trained_run(tmp_path / "other", seed=1)
    assert "another model" in error("--checkpoint", str(other))
    assert "is none of exact, faiss" in error("--index", "annoy")
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
    assert f"{bad / '001.jpg'}: cannot be decoded" in error(bad, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    assert "there is no folder" in error(tmp_path / "missing", tmp_path / "out.npz")
    assert "no pictures below" in error(case / "run", tmp_path / "out.npz")
    assert ".safetensors or .npz" in error(case / "pictures", tmp_path / "out.pkl")
    assert "make it first" in error(case / "pictures", tmp_path / "missing" / "out.npz")
