"""`evaluate` as a command: its options, on one rank and on two."""

import errno
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ecn_dist.data import ShardIndex
from ecn_dist.evaluate import main as evaluate
from ecn_dist.models import export_weights
from tests.dataset_folders import pack_folder, write_market
from tests.integration.conftest import DEMO_CONFIG
from tests.networks import source_network


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An untrained network, and six people seen by three cameras."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    network = source_network(embedding_dim=256, num_identities=6)
    export_weights(network, folder / "weights.safetensors")
    pack_folder(write_market(folder / "data", identities=6), folder / "shards", min_shards=2)
    places = ["--checkpoint", str(folder / "weights.safetensors"), "--data", str(folder / "shards")]
    return [*places, "--config", str(DEMO_CONFIG), "--device", "cpu", "--workers", "0", "--batch_size", "5"]


def run(argv: list[str]) -> int:
    return inspect.unwrap(evaluate)(argv)


def figures(arguments: list[str], output: Path, *options: str) -> dict[str, Any]:
    assert evaluate([*arguments, *options, "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("options", [[], ["--rerank"], ["--expand_queries", "2"], ["--camera_free"]])
def test_two_ranks_give_the_figures_of_one(ranks, arguments: list[str], tmp_path: Path, options: list[str]) -> None:
    one = figures(arguments, tmp_path / "one.json", *options)
    ranks(2).run(run, [*arguments, *options, "--output", str(tmp_path / "two.json")])
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert one["num_valid_queries"] == 18
    assert ("tpr_at_fpr_0.001" in one) == (options != ["--rerank"])


def test_options_change_the_ranking(arguments: list[str], tmp_path: Path, capsys) -> None:
    plain = figures(arguments, tmp_path / "plain.json")
    for options in (["--rerank"], ["--expand_queries", "2"], ["--camera_free"]):
        assert figures(arguments, tmp_path / "other.json", *options)["mAP"] != plain["mAP"]
    pairs = plain["camera_pairs"]
    assert pairs["camids"] == [0, 1, 2]
    assert [pairs["mAP"][camera][camera] for camera in range(3)] == [None] * 3
    off_diagonal = [value for row in pairs["rank1"] for value in row if value is not None]
    assert len(off_diagonal) == 6
    assert all(0 <= value <= 1 for value in off_diagonal)


def test_data_of_one_camera_have_no_junk(arguments: list[str], tmp_path: Path) -> None:
    root = write_market(tmp_path / "data", identities=6, cameras=1)
    for path in (root / "bounding_box_test").glob("*_c2*"):  # distractors
        path.unlink()
    pack_folder(root, tmp_path / "shards")
    assert ShardIndex.load(str(tmp_path / "shards")).num_cameras == 1
    at = arguments.index("--data") + 1
    own = [*arguments[:at], str(tmp_path / "shards"), *arguments[at + 1 :]]
    found = figures(own, tmp_path / "figures.json")
    assert found["num_valid_queries"] == 6
    assert found["camera_pairs"] is None
    assert figures(own, tmp_path / "camera_free.json", "--camera_free") == found


def test_adabn_takes_statistics_of_the_data(arguments: list[str], tmp_path: Path) -> None:
    config = yaml.safe_load(DEMO_CONFIG.read_text()) | {"global_batch_size": 12, "data": {"streams": 12, "height": 64}}
    config["data"]["width"] = 32
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    own = [*arguments, "--config", str(tmp_path / "config.yaml")]
    adapted = figures(own, tmp_path / "adapted.json", "--adapt_batchnorm")
    assert adapted["mAP"] != figures(own, tmp_path / "plain.json")["mAP"]


def test_a_full_disk_leaves_the_figures_of_before(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "figures.json"
    output.write_text("the figures of before")
    monkeypatch.setattr(os, "fsync", full)
    assert evaluate([*arguments, "--output", str(output)]) == 2
    assert f"{output}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert output.read_text() == "the figures of before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "'0' must be a whole number, at least 1"),
        (["--workers", "-1"], "'-1' must be a whole number, at least 0"),
        (["--output", "absent/figures.json"], "there is no folder absent"),
    ],
)
def test_mistakes_are_told_before_anything_is_embedded(
    arguments: list[str], options: list[str], message: str, capsys
) -> None:
    try:
        status = evaluate([*arguments, *options])
    except SystemExit as left:  # argparse
        status = left.code
    assert status == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "mAP" not in shown.out
