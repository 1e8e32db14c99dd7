"""Loader workers: reading ahead, signals that are not theirs, and what happens when one is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecn_dist.data.batches import Batches, RawBatch
from ecn_dist.data.loader import check_shared_memory, load
from ecn_dist.errors import UserError


class Recorded(Batches):
    """Batch t holds t in one pixel, and is noted in a file when it is made."""

    def __init__(self, folder: Path, lost_at: int = -1) -> None:
        self.made = folder / "made"
        self.made.touch()
        self.lost_at = lost_at

    def num_pictures(self, step: int) -> int:
        return 1

    def failed(self, step: int, error: str) -> RawBatch:
        return RawBatch(torch.zeros(1, dtype=torch.uint8), np.zeros(1), np.zeros(1), error=error)

    def __getitem__(self, step: int) -> RawBatch:
        if step == self.lost_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.made.open("a") as file:
            file.write(f"{step}\n")
        return RawBatch(torch.tensor([step], dtype=torch.uint8), np.zeros(1), np.zeros(1))

    def steps_made(self) -> list[int]:
        return sorted(map(int, self.made.read_text().split()))


def within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def loader_workers() -> list[Any]:
    """Live children from the loader's fork server; the ranks that other tests keep are of another kind."""
    children = multiprocessing.active_children()
    return [child for child in children if isinstance(child, multiprocessing.context.ForkServerProcess)]


def steps(batches: Any) -> list[int]:
    return [int(batch.pixels_bHW3) for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order(tmp_path: Path, workers: int) -> None:
    batches = Recorded(tmp_path)
    assert steps(load(batches, range(3, 20), workers=workers, pin_memory=False)) == list(range(3, 20))
    assert steps(load(batches, range(7, 7), workers=workers, pin_memory=False)) == []
    assert batches.steps_made() == list(range(3, 20))


def test_workers_read_ahead_without_a_pause_but_not_endlessly(tmp_path: Path) -> None:
    batches = Recorded(tmp_path)
    loading = load(batches, range(100), workers=2, pin_memory=False)
    for step in range(20):
        assert int(next(loading).pixels_bHW3) == step
        # Two batches a worker, and one for the one that was taken.
        assert within(5, lambda step=step: len(batches.steps_made()) >= step + 4)
    assert len(batches.steps_made()) <= 20 + 5
    loading.close()


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(load(Recorded(tmp_path), range(3), workers=1, pin_memory=False))
    assert torch.equal(torch.rand(3), expected)


def test_workers_leave_signals_to_the_training_process(tmp_path: Path) -> None:
    loading = load(Recorded(tmp_path), range(50), workers=2, pin_memory=False)
    first = [int(next(loading).pixels_bHW3) for _ in range(5)]
    workers = [process.pid for process in loader_workers()]
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1", "USR2"):
        # By another process, as a terminal or a scheduler would send it.
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {server} {' '.join(map(str, workers))}"], check=True)
    assert first + steps(loading) == list(range(50))


def test_workers_end_when_the_stream_is_left(tmp_path: Path) -> None:
    loading = load(Recorded(tmp_path), range(50), workers=2, pin_memory=False)
    next(loading)
    assert len(loader_workers()) == 2
    loading.close()
    assert within(5, lambda: not loader_workers())


def test_workers_obey_a_termination_by_the_training_process(tmp_path: Path) -> None:
    loading = load(Recorded(tmp_path), range(50), workers=1, pin_memory=False)
    next(loading)
    (worker,) = loader_workers()
    worker.terminate()
    assert within(5, lambda: not worker.is_alive())
    loading.close()


def test_a_lost_worker_is_an_error_in_place_of_its_batch(tmp_path: Path) -> None:
    *made, last = load(Recorded(tmp_path, lost_at=6), range(50), workers=2, pin_memory=False)
    # The loss is noticed at once, perhaps before batches that were already made are handed over; none is skipped.
    assert steps(made) == list(range(len(made)))
    assert len(made) <= 6
    assert last.error is not None
    assert f"a loader worker failed at step {len(made)}: " in last.error


SCRIPT = """
    import multiprocessing, sys, time
    from pathlib import Path
    from tests.unit.data.test_stream_loader import Recorded
    from ecn_dist.data.loader import load

    if __name__ == "__main__":
        loading = load(Recorded(Path(sys.argv[1])), range(50), workers=2, pin_memory=False)
        next(loading)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_training_process(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert within(20, lambda: not any(_runs(worker) for worker in workers))


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_that_would_fill_the_shared_memory_are_refused() -> None:
    check_shared_memory(1000, 2)
    with pytest.raises(UserError, match=r"2 data workers need .* MiB of shared memory.*--shm-size"):
        check_shared_memory(1 << 50, 2)
