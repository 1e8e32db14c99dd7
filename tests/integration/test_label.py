"""`label` as a command: the clusters of the dense definition, with the pictures' names, on one rank and on two."""

import csv
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ecn_dist import Embedder
from ecn_dist.data import ShardIndex
from ecn_dist.data.index import ShardInfo, SplitIndex
from ecn_dist.label import _write
from ecn_dist.label import main as label
from ecn_dist.models import export_weights
from tests.dataset_folders import pack_folder, write_market
from tests.integration.conftest import DEMO_CONFIG
from tests.networks import source_network
from tests.reference_clusters import dense_clusters
from tests.unit.data.index_folder import NUM_CAMERAS, make_members

SEARCH = ["--eps", "0.5", "--k1", "8", "--k2", "3", "--min_samples", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights.safetensors of an untrained network, and data/ and shards/ of six people seen by three cameras."""
    folder = tmp_path_factory.mktemp("label")
    torch.manual_seed(0)
    export_weights(source_network(embedding_dim=256, num_identities=6), folder / "weights.safetensors")
    pack_folder(write_market(folder / "data", identities=6), folder / "shards", min_shards=2)
    return folder


def arguments(folder: Path, output: Path, *options: str) -> list[str]:
    places = ["--checkpoint", str(folder / "weights.safetensors"), "--data", str(folder / "shards")]
    places += ["--config", str(DEMO_CONFIG), "--output", str(output)]
    return [*places, "--device", "cpu", "--workers", "0", "--batch_size", "5", *options]


def run(argv: list[str]) -> int:
    return inspect.unwrap(label)(argv)


@pytest.mark.parametrize("camera_aware", ["false", "true"])
def test_the_clusters_of_the_dense_definition(ranks, folder: Path, tmp_path: Path, capsys, camera_aware: str) -> None:
    options = [*SEARCH, "--camera_aware", camera_aware, "--k1_intra", "2", "--k1_inter", "4"]
    assert label(arguments(folder, tmp_path / "one.csv", *options)) == 0
    said = capsys.readouterr().out
    ranks(2).run(run, arguments(folder, tmp_path / "two.csv", *options))
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()

    rows = list(csv.DictReader((tmp_path / "one.csv").open()))
    pictures = sorted(path.name for path in (folder / "data" / "bounding_box_train").iterdir())
    assert [row["file"] for row in rows] == pictures
    assert [int(row["camera"]) for row in rows] == [int(name.split("_c")[1][0]) - 1 for name in pictures]
    stored = ShardIndex.load(str(folder / "shards")).split("train").indices
    paths = [folder / "data" / "bounding_box_train" / pictures[index] for index in stored]
    features = torch.from_numpy(Embedder.load(folder / "weights.safetensors", "cpu", DEMO_CONFIG)(paths, 5))
    camids = torch.tensor([int(rows[index]["camera"]) for index in stored])
    search = {"eps": 0.5, "min_samples": 2, "k1": 8, "k2": 3, "k1_intra": 2, "k1_inter": 4}
    expected = dense_clusters(features, **search, **({"camids": camids} if camera_aware == "true" else {}))
    found = np.array([int(row["label"]) for row in rows])
    np.testing.assert_array_equal(found[stored], expected)
    assert f"{found.max() + 1} clusters, {(found < 0).sum()} outliers" in said
    assert 1 <= found.max() + 1 < len(found)
    assert "AMI" in said


def test_options_that_are_not_given_are_the_runs(folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(DEMO_CONFIG.read_text()) | {"cluster": {"eps": 0.5, "k1": 8, "k2": 3, "min_samples": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given, of_the_run = tmp_path / "given.csv", tmp_path / "run.csv"
    assert label(arguments(folder, given, *SEARCH)) == 0
    assert label([*arguments(folder, of_the_run), "--config", str(tmp_path / "config.yaml")]) == 0
    assert of_the_run.read_text() == given.read_text()
    assert label([*arguments(folder, of_the_run), "--config", str(tmp_path / "config.yaml"), "--eps", "0.1"]) == 0
    assert of_the_run.read_text() != given.read_text()


def test_clusters_of_too_low_an_eps_are_named(folder: Path, tmp_path: Path, capsys) -> None:
    assert label(arguments(folder, tmp_path / "labels.csv", "--eps", "0.001")) == 0
    assert "raise --eps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--eps", "1"], "--eps: 1.0 must be above 0 and below 1"),
        (["--k1", "3", "--k2", "4"], "--k2: 4 must be at most --k1 (3)"),
        (["--output", "labels.txt"], "must end in .csv"),
        (["--copies"], "camera_style"),
    ],
)
def test_mistakes_are_named_and_write_nothing(
    folder: Path, tmp_path: Path, capsys, options: list[str], said: str
) -> None:
    assert label(arguments(folder, tmp_path / "labels.csv", *options)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sidecar_of_another_picture_is_found(folder: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    split = ShardIndex.load(str(copy / "shards")).split("train")
    first = split.members[0]
    with open(split.shard_path(0), "r+b") as shard:
        shard.seek(int(first["json_offset"]))
        shard.write(b'{"index": 3' + b" " * (int(first["json_length"]) - 12) + b"}")
    assert label(arguments(copy, tmp_path / "labels.csv", *SEARCH)) == 2
    assert "KEY.json" in capsys.readouterr().err


def test_names_of_files_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    picture = next((data / "bounding_box_train").iterdir())
    picture.rename(picture.with_name(picture.stem + "_caf\udce9\n.jpg"))  # Latin-1, as Linux lets a file be called
    pack_folder(data, tmp_path / "shards")
    output = tmp_path / "labels.csv"
    assert label([*arguments(folder, output, *SEARCH), "--data", str(tmp_path / "shards")]) == 0
    with output.open(encoding="utf-8", newline="") as table:
        names = [row["file"] for row in csv.DictReader(table)]
    assert picture.stem + "_caf\\udce9\n.jpg" in names
    assert len(names) == 36


def test_a_few_clusters_among_outliers_are_judged_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = make_members([1, 1, 2, 3, 4, 5])
    members["index"] = range(6)
    split = SplitIndex("train", "shards", (ShardInfo("a.tar", 6, 1, "0"),), members, NUM_CAMERAS, (1, 2, 3, 4, 5))
    _write(tmp_path / "labels.csv", split, np.array([0, 0, -1, -1, -1, -1]), [f"{n}.jpg" for n in range(6)])
    said = capsys.readouterr().out
    assert "most pictures are near no other" in said
    assert "AMI, over clustered pictures): 1.000" in said
