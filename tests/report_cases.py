"""Run folders for the tests of the report, as `train` leaves them."""

import json
import math
from pathlib import Path

import yaml

from ecn_dist.data.index import ShardIndex
from ecn_dist.reporting.figures import write_figures
from tests.dataset_folders import MARKET, pack_folder, write_picture
from tests.picture_cases import evaluation_of, random_case

CONFIG = {
    "source": "shards/source",
    "target": "shards/target",
    "epochs": 12,
    "global_batch_size": 60,
    "precision": "fp32",
    "device": "auto",
    "data": {"camera_style": True, "height": 64, "width": 32},
    "model": {"arch": "small_resnet", "weights": "none"},
    "loss": {"target_weight": 0.3, "num_neighbors": 6, "neighbors_from_epoch": 2},
    "optim": {"source_only_epochs": 4},
}
EVALUATION = {
    "mAP": 0.431,
    "mAP_stepwise": 0.422,
    "rank1": 0.753,
    "rank5": 0.876,
    "rank10": 0.916,
    "mINP": 0.2,
    "num_valid_queries": 3368,
}
SUMMARY = {
    "world_size": 2,
    "steps": 256,
    "epochs": 12,
    "wall_seconds": 3725.0,
    "images_per_second": 912.34,
    "evaluation": EVALUATION,
    "machine": {"processor": "Model T", "cores": 2},
}


def write_run(folder: Path, *, figures: bool = False) -> Path:
    """A finished run; with `figures` its pictures too."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [
        {"step": step, "epoch": step // 16 - 4, "loss": 3 * math.exp(-step / 90), "lr": 0.03, "images_per_second": 900}
        for step in range(0, 256, 8)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures:
        evaluation = evaluation_of(random_case(0, queries=20))
        write_figures(folder, evaluation, {"target": shards_of(folder.with_name("shards"), queries=20)})
    return folder


def shards_of(folder: Path, *, queries: int, camera_style: str = "histogram") -> ShardIndex:
    """Shards with the pictures of `random_case(queries=...)`, if not its people, and 24 training pictures."""
    for split, count in {"train": 24, "query": queries, "gallery": 40}.items():
        for row in range(count):
            name = f"{1 + row % 8:04d}_c{1 + row % 3}s1_{row:06d}_00.jpg"
            write_picture(folder / "market" / MARKET[split] / name, (len(split), row))
    return pack_folder(folder / "market", folder / "packed", camera_style=camera_style)
