"""Feeds of several sizes in one step: what the trainer asks of each before anything starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ecn_dist.config import Config, DataConfig, ModelConfig
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Feed, Step
from ecn_dist.training.feeding import Feeder
from tests.tiny_shards import write_split

FEEDS = (Feed("source", "source", 12), Feed("target", "target", 4, style="all"))


def feeder(folder: Path, world_size: int, feeds: tuple[Feed, ...] = FEEDS, **model: Any) -> Feeder:
    splits = {}
    for domain in ("source", "target"):
        (folder / domain).mkdir(exist_ok=True)
        splits[domain] = write_split(folder / domain, [24], num_cameras=3)
    data = DataConfig(height=32, width=16, streams=4, workers=0)
    config = Config(global_batch_size=12, epochs=1, data=data, model=ModelConfig(**model))
    method = SimpleNamespace(feeds=lambda: feeds, steps_per_epoch=lambda: None)
    return Feeder(config, method, splits, torch.device("cpu"), world_size)  # type: ignore[arg-type]


def test_a_picture_with_its_copies_is_one_for_each_camera(tmp_path: Path) -> None:
    made = feeder(tmp_path, 2)
    at = Step(0, 0, source_only=False)
    assert made.timeline.steps_per_epoch == 2
    assert made.images(at) == 12 + 4 * 3
    made.begin_epoch(at)
    batches, _ = made.next(at)
    assert {name: len(batch.images) for name, batch in batches.items()} == {"source": 6, "target": 2 * 3}
    made.close()


def test_batchnorm_must_suit_every_pass(tmp_path: Path) -> None:
    assert feeder(tmp_path, 2, batchnorm="group", batchnorm_group=12)  # 12 pictures, and 4 with 3 views
    real = (FEEDS[0], Feed("target", "target", 4))
    with pytest.raises(UserError, match="batchnorm_group: 12 does not divide a batch of 4 pictures"):
        feeder(tmp_path, 2, real, batchnorm="group", batchnorm_group=12)
