"""Pictures that cannot be decoded, and losses that are no longer finite, over a whole run."""

import json
import shutil
from pathlib import Path

import pytest

from ecn_dist.data import ShardIndex
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.train import main as train
from ecn_dist.training import trainer
from tests.integration.conftest import Domains
from tests.integration.training import SHORT, THIN, checkpoint_steps, train_on


def with_damaged_picture(shards: Path, folder: Path) -> Path:
    """A copy of a shard folder in which the first training picture, and its style copies, are zeros."""
    shutil.copytree(shards, folder)
    split = ShardIndex.load(str(folder)).split("train")
    member = split.members[0]
    with (folder / split.shards[member["shard"]].name).open("r+b") as shard:
        for offset, length in zip(member["offset"], member["length"], strict=True):
            shard.seek(int(offset))
            shard.write(b"\0" * int(length))
    return folder


@pytest.mark.timeout(300)
def test_replaced_pictures_are_counted_over_all_ranks(ranks, small_domains: Domains, tmp_path: Path) -> None:
    source = with_damaged_picture(small_domains.source, tmp_path / "source")
    options = [*small_domains.options, *SHORT, *THIN, "--source", str(source), "--output_dir", str(tmp_path / "run")]
    assert train_on(ranks, 2, [*options, "--data.max_bad_samples", "1"]) == {0}
    counts = [line["replaced_pictures"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert counts == sorted(counts)
    assert counts[-1] == 3  # once in each of three passes over the source
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert json.loads((newest / "meta.json").read_text())["replaced_pictures"] == 3


@pytest.mark.timeout(300)
def test_a_run_in_fp16_that_diverges_ends_and_keeps_what_was_good(
    small_domains: Domains, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "MAX_SKIPPED_IN_A_ROW", 5)
    options = [*small_domains.options, *SHORT, "--precision", "fp16", "--checkpoint.every_steps", "1"]
    steep = ["--optim.lr", "1e9", "--optim.backbone_lr", "1e9", "--optim.warmup_epochs", "0"]
    assert train([*options, *steep, "--output_dir", str(tmp_path)]) == 2
    assert "5 steps in a row" in capsys.readouterr().err
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["skipped_steps"] >= 4
    assert checkpoint_steps(tmp_path)[-1] < last["step"]
