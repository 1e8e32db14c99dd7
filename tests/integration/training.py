"""The train command on ranks that are already there: a fraction of a second instead of a torchrun's start.

Top-level functions, for `ranks(n).run`. Everything that `ecn_dist.train` does happens, but for the group's start and
end.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.distributed import load_sharded
from ecn_dist.engine.tracking import read_metrics
from ecn_dist.train import main

# One epoch on the source alone, two with both losses, neighbours in the second.
SHORT = (
    *("--optim.source_only_epochs", "1", "--epochs", "2", "--loss.neighbors_from_epoch", "1"),
    *("--logging.every_steps", "4", "--logging.tensorboard", "false", "--logging.figures", "false"),
)


def train(argv: list[str], stop_rank: int | None = None, stop_step: int = 0, sent: int = signal.SIGUSR2) -> int:
    """Run the command on this rank; its exit status. `stop_rank` gets a signal once `stop_step` is in the metrics."""
    output_dir = Path(argv[argv.index("--output_dir") + 1])
    stopper = threading.Thread(target=_send, args=(output_dir, stop_step, sent), daemon=True)
    if stop_rank == distributed.rank():
        stopper.start()
    status = main.__wrapped__(argv)  # type: ignore[attr-defined]
    if stop_rank == distributed.rank():
        stopper.join()
    return status


def _send(output_dir: Path, step: int, number: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(output_dir / "metrics.jsonl")):
            os.kill(os.getpid(), number)
            return
        time.sleep(0.01)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def memory_rows(run: Path, num_exemplars: int, dim: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.zeros(num_exemplars, dim, dtype=dtype)
    load_sharded({"memory.rows": rows}, newest(run))
    return rows


def loss_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    timed = ("images_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run / "metrics.jsonl")]
