"""The train command on ranks that are already there: a fraction of a second instead of a torchrun's start.

Top-level functions, for `ranks(n).run`. Everything that `ecn_dist.train` does happens, but for the group's start and
end.
"""

import inspect
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.train import main
from tests import thin_networks  # noqa: F401  (their names, on every rank)
from tests.ranks import RankPool

# A quarter of the demo's pixels, for what is the same at any size.
SMALL_INPUT = ["--data.height", "32", "--data.width", "16"]
# For what is the same with any network, on ranks of `train_on` and in this process: torchrun's do not know it.
THIN = ["--model.arch", "thin_convnet"]
# Ten steps an epoch of the small domains: one epoch on the source alone, two with both losses, the second of them with
# neighbours and a momentum of the memory.
SHORT = [
    *("--optim.source_only_epochs", "1", "--epochs", "2", "--loss.neighbors_from_epoch", "1"),
    *("--logging.every_steps", "4", "--logging.tensorboard", "false", "--logging.figures", "false"),
    *SMALL_INPUT,
]


def train_on(
    ranks: RankPool, world_size: int, argv: list[str], stop_rank: int | None = None, stop_step: int = 0
) -> set[int]:
    """`train` on each of `world_size` ranks; their exit statuses."""
    return set(ranks(world_size).run(train, argv, stop_rank, stop_step, timeout=600.0))


def train(argv: list[str], stop_rank: int | None = None, stop_step: int = 0) -> int:
    """Run the command on this rank; its exit status. `stop_rank` gets SIGUSR2 once `stop_step` is in the metrics."""
    output_dir = Path(argv[argv.index("--output_dir") + 1])
    stopper = threading.Thread(target=_send, args=(output_dir, stop_step, signal.SIGUSR2), daemon=True)
    if stop_rank == distributed.rank():
        stopper.start()
    status = inspect.unwrap(main)(argv)
    if stop_rank == distributed.rank():
        stopper.join()
    return status


def _send(output_dir: Path, step: int, number: int) -> None:
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline:
        if newest_step(output_dir) >= step:
            os.kill(os.getpid(), number)
            return
        time.sleep(0.01)


def newest_step(run: Path) -> int:
    """The last step in metrics.jsonl, -1 where there is none."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=-1)


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def final_tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, its parts put together."""
    newest = max((run / "checkpoints").glob("step-*"))
    parts: dict[str, list[Tensor]] = {}
    for shard in sorted(newest.glob("*.safetensors")):
        for key, tensor in load_file(shard).items():
            parts.setdefault(key, []).append(tensor)
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def loss_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    timed = ("images_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run / "metrics.jsonl")]


def assert_equal_runs(run: Path, expected: Path) -> None:
    """The same lines of metrics, each once, and bitwise the same final state and exported weights."""
    assert loss_lines(run) == loss_lines(expected)
    tensors, expected_tensors = final_tensors(run), final_tensors(expected)
    assert tensors.keys() == expected_tensors.keys()
    for key in tensors:
        assert torch.equal(tensors[key], expected_tensors[key]), key
    assert (run / "weights.safetensors").read_bytes() == (expected / "weights.safetensors").read_bytes()
