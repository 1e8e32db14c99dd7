"""A torchrun whose workers can be watched, signalled and killed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.integration.conftest import REPOSITORY
from tests.integration.training import newest_step


class RunningTrain:
    """`torchrun ... -m MODULE OPTIONS`, in a process group of its own; use as a context manager."""

    def __init__(
        self, options: list[str], *, ranks: int, max_restarts: int = 0, module: tuple[str, ...] = ("ecn_dist.train",)
    ) -> None:
        self.run = Path(options[options.index("--output_dir") + 1])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        self.process = subprocess.Popen(
            [*command, f"--max-restarts={max_restarts}", "-m", *module, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def __enter__(self) -> "RunningTrain":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for worker in self.workers():
                os.kill(worker, signal.SIGKILL)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def workers(self) -> list[int]:
        """Process ids, in the order of local ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def wait_for_step(self, step: int, seconds: float = 200.0) -> None:
        """Wait until `step` is in the metrics, of a logging.every_steps of 1."""
        deadline = time.monotonic() + seconds
        while newest_step(self.run) < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"step {step} was not reached\n{self.finish()[1]}")
            time.sleep(0.02)

    def wait_for_save(self, seconds: float = 200.0) -> None:
        """Wait until a checkpoint begins to be written. Polls without pause: it takes some hundredths of a second."""
        deadline = time.monotonic() + seconds
        before = self._unfinished()
        while self._unfinished() <= before:  # what a kill left is no sign of a save
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no checkpoint was written\n{self.finish()[1]}")

    def _unfinished(self) -> set[int]:
        """Unfinished checkpoints, by what tells two folders of one name apart."""
        found = set()
        for folder in self.run.glob("checkpoints/tmp-step-*"):
            with contextlib.suppress(FileNotFoundError):
                found.add(folder.stat().st_ctime_ns)
        return found

    def wait_for_workers(self, count: int, other_than: Sequence[int] = (), seconds: float = 200.0) -> list[int]:
        """Wait until there are `count` workers, none of them one of `other_than`; their process ids."""
        deadline = time.monotonic() + seconds
        while len(workers := self.workers()) != count or not set(workers).isdisjoint(other_than):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{count} new workers were not started\n{self.finish()[1]}")
            time.sleep(0.02)
        return workers

    def finish(self, seconds: float = 240.0) -> tuple[int, str]:
        """torchrun's exit status, and what it and the ranks printed."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.__exit__()
            raise
        return self.process.returncode, output


def train_with_kills(options: list[str], *, ranks: int, kills: int, total_steps: int, seed: int) -> str:
    """Train to the end through `kills` SIGKILLs at random steps, of random ranks, each second one during a save.

    `options` must log every step, and save often. Returns the output.
    """
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, total_steps - 3), kills))
    with RunningTrain(options, ranks=ranks, max_restarts=kills) as training:
        workers: list[int] = []
        for number, step in enumerate(steps):
            workers = training.wait_for_workers(ranks, other_than=workers)
            training.wait_for_step(step)
            if number % 2:
                training.wait_for_save()
            else:
                time.sleep(draw.uniform(0.0, 0.2))
            os.kill(draw.choice(workers), signal.SIGKILL)
        status, output = training.finish()
    assert status == 0, output
    return output
