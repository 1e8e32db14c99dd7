"""What a run tells: metrics.jsonl, TensorBoard, one progress line, a log per rank."""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ecn_dist import distributed
from ecn_dist.errors import printable_lines
from ecn_dist.files import write_atomically
from ecn_dist.reporting.run_reader import METRICS, read_metrics

log = logging.getLogger("ecn_dist")


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))  # messages may hold names from data


def start_logs(output_dir: Path) -> None:
    """Write this rank's log to logs/rank-N.log; rank 0's notes of level INFO and above also go to the console."""
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(folder / f"rank-{distributed.rank()}.log")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    if distributed.is_main():
        to_console = logging.StreamHandler(sys.stdout)
        to_console.setFormatter(_ConsoleFormatter("%(message)s"))
        to_console.addFilter(lambda record: not getattr(record, "file_only", False))
        log.addHandler(to_console)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a full disk under the log is told by what needs it, and not by tracebacks


@dataclass
class Interval:
    """Sums since the last line of metrics; losses stay on the device until they are written."""

    losses: Tensor  # by the names of the method
    steps: int = 0
    steps_here: int = 0  # of them, those since this process started: what the times below belong to
    data_wait: float = 0.0
    replaced: int = 0  # pictures of this rank that could not be decoded
    started: float = field(default_factory=time.monotonic)

    def add(self, losses: Tensor, data_wait: float, replaced: int) -> None:
        self.steps += 1
        self.steps_here += 1
        self.losses = self.losses + losses
        self.data_wait += data_wait
        self.replaced += replaced

    def sums(self) -> Tensor:
        """(W, losses + 1), a row a rank: its losses and steps, for a checkpoint."""
        own = torch.cat([self.losses, self.losses.new_tensor([self.steps])])
        return distributed.as_row_sharded(own[None], distributed.world_size())

    def load_sums(self, sums: Tensor, most_steps: int) -> None:
        """Go on from what `sums` returned, on as many ranks."""
        *losses, steps = distributed.own_part(sums)[0]
        self.losses, self.steps = torch.stack(losses), int(steps.nan_to_num(0).clamp(0, most_steps))

    def mean_losses(self) -> list[float]:
        """Means over the steps and all ranks. Collective."""
        return (distributed.all_reduce(self.losses) / (self.steps * distributed.world_size())).tolist()


class Tracker:
    """Rank 0's record of a run; on the other ranks every call does nothing."""

    def __init__(self, output_dir: Path, *, first_step: int, total_steps: int, tensorboard: bool) -> None:
        """Continue the record at `first_step`: lines of metrics.jsonl from there on, left by a run cut off, go."""
        self._active = distributed.is_main()
        self._writer: SummaryWriter | None = None
        if not self._active:
            return
        self._path = output_dir / METRICS
        kept = [line for line in read_metrics(self._path) if line["step"] < first_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        if tensorboard:
            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step)
        self._first_step, self._total, self._started = first_step, total_steps, time.monotonic()
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[figures]}"
        console = Console()
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step, figures="")
        self._progress.start()

    def metrics(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, its numbers to TensorBoard; `record` has `step` and `epoch`. Collective."""
        distributed.together(lambda: self._append(record) if self._active else None, METRICS)

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {key.replace("_", "/", 1): value for key, value in record.items() if key != "step"}
        numbers |= {f"evaluation/{key}": value for key, value in record.get("evaluation", {}).items()}
        for tag, value in numbers.items():
            if self._writer is not None and isinstance(value, int | float):
                add = functools.partial(self._writer.add_scalar, tag, value, record["step"])
                self._writer = self._writer if _mirrored(add) else None

    def progress(self, step: int, epoch: str, figures: str, *, epoch_ended: bool) -> None:
        """Move the progress line to after `step`; where there is no terminal, print a line at an epoch's end."""
        if not self._active:
            return
        self._progress.update(self._task, completed=step + 1, description=epoch, figures=figures)
        if self._progress.disable and epoch_ended:
            elapsed, done = time.monotonic() - self._started, step + 1
            left = timedelta(seconds=round(elapsed / max(done - self._first_step, 1) * (self._total - done)))
            print(f"{epoch}  step {done}/{self._total}  {figures}  {left} left", flush=True)

    def close(self) -> None:
        """Flush and close."""
        if self._active:
            self._progress.stop()
        if self._writer is not None:
            _mirrored(self._writer.close)


def _mirrored(write: Callable[[], object]) -> bool:
    """Whether TensorBoard's files could be written. A failure is told and no more: metrics.jsonl is the record."""
    try:
        write()
    except OSError as error:
        log.warning("TensorBoard's record ends here (%s); metrics.jsonl goes on", error)
        return False
    return True


@contextmanager
def pictures_for_tensorboard(output_dir: Path, wanted: bool) -> Iterator[SummaryWriter | None]:
    """A writer beside the run's, on rank 0 and where it is `wanted`."""
    writer = SummaryWriter(str(output_dir / "tensorboard")) if wanted and distributed.is_main() else None
    try:
        yield writer
    finally:
        if writer is not None:
            _mirrored(writer.close)


def describe(evaluation: dict[str, Any]) -> str:
    """One line of figures in percent, each under its name."""
    names = {"mAP": "mAP", "mAP_stepwise": "stepwise mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10"}
    return "  ".join(f"{name} {100 * evaluation[key]:.1f}" for key, name in names.items())
