"""The table of a data set: its numbers, and no name of a hostile shard folder raw on the terminal."""

import dataclasses
import json
from pathlib import Path

import pytest

from ecn_dist.data.index import ShardIndex
from ecn_dist.packing.validation import print_summary
from tests.dataset_folders import pack_folder, write_market

HOSTILE = "\x1b]0;OWNED\x07\x1b[2J\nforged: sound [red]"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    root = tmp_path_factory.mktemp("summary")
    pack_folder(write_market(root / "data"), root / "shards", camera_style="histogram", min_shards=2)
    return ShardIndex.load(str(root / "shards"))


def shown(index: ShardIndex, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    print_summary(index)
    return capsys.readouterr().out.splitlines()


def test_numbers_of_each_split(
    index: ShardIndex, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(index, capsys, monkeypatch)
    for name, split in index.splits.items():
        (line,) = [line for line in lines if f" {name} " in line]
        assert f" {len(split)} " in line
        assert f" {len(split.shards)} " in line


def test_names_do_not_reach_the_terminal_raw(
    index: ShardIndex, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = json.loads(json.dumps(index.about))
    about["splits"][HOSTILE] = about["splits"]["gallery"] | {"distractors": 1}
    hostile = dataclasses.replace(
        index, layout=HOSTILE, splits={**index.splits, HOSTILE: index.splits["gallery"]}, about=about
    )
    lines = shown(hostile, capsys, monkeypatch)
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("forged")]
    assert len([line for line in lines if r"\x1b[2J\nforged: sound [red]" in line]) == 3  # title, row, note
