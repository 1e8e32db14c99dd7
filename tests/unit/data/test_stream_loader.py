"""Loader workers: reading ahead, signals that are not theirs, and what happens when one is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecn_dist.data.dataset import PictureDataset, RawBatch
from ecn_dist.data.loader import Loader, check_shared_memory
from ecn_dist.data.plan import Step
from ecn_dist.errors import UserError

CPU = torch.device("cpu")


class Recorded(PictureDataset):
    """Batch t holds t in one pixel, and is noted in a file when it is made."""

    def __init__(self, folder: Path, lost_at: int = -1) -> None:
        self.made = folder / "made"
        self.made.touch()
        self.lost_at = lost_at

    def failed(self, samples: int, error: str) -> RawBatch:
        return RawBatch(torch.zeros(1, dtype=torch.uint8), error=error)

    def __getitem__(self, step: Step) -> RawBatch:
        if step.number == self.lost_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.made.open("a") as file:
            file.write(f"{step.number}\n")
        return RawBatch(torch.tensor([step.number], dtype=torch.uint8))

    def steps_made(self) -> list[int]:
        return sorted(map(int, self.made.read_text().split()))


def within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def loader_workers() -> list[Any]:
    """Live workers of loaders; the ranks that other tests keep are no daemons."""
    return [child for child in multiprocessing.active_children() if child.daemon]


def planned(steps: range) -> list[Step]:
    return [Step(np.zeros(1, np.int64), np.zeros(1, np.int64), 0, number) for number in steps]


def load(loader: Loader, steps: range) -> Iterator[int]:
    for step, batch in loader.load(planned(steps)):
        assert step.number == int(batch.data)
        yield step.number


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order(tmp_path: Path, workers: int) -> None:
    recorded = Recorded(tmp_path)
    loader = Loader(recorded, workers, CPU)
    assert list(load(loader, range(3, 20))) == list(range(3, 20))
    assert list(load(loader, range(7, 7))) == []
    assert recorded.steps_made() == list(range(3, 20))


def test_workers_read_ahead_without_a_pause_but_not_endlessly(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    loading = load(Loader(recorded, 2, CPU), range(100))
    for step in range(20):
        assert next(loading) == step
        # Two batches a worker, and one for the one that was taken.
        assert within(5, lambda step=step: len(recorded.steps_made()) >= step + 4)
    assert len(recorded.steps_made()) <= 20 + 5


def test_one_range_after_the_other_is_made_by_the_same_workers(tmp_path: Path) -> None:
    loader = Loader(Recorded(tmp_path), 2, CPU)
    assert list(load(loader, range(5))) == list(range(5))
    workers = {process.pid for process in loader_workers()}
    left = load(loader, range(5, 50))
    assert [next(left) for _ in range(3)] == [5, 6, 7]  # the rest of this range is dropped
    assert list(load(loader, range(70, 80))) == list(range(70, 80))
    with pytest.raises(RuntimeError, match="another range"):
        next(left)
    assert list(load(loader, range(3))) == [0, 1, 2]
    assert {process.pid for process in loader_workers()} == workers
    loader.close()
    assert within(5, lambda: not loader_workers())
    assert list(load(loader, range(3))) == [0, 1, 2]


def test_workers_lost_between_two_ranges_are_replaced(tmp_path: Path) -> None:
    loader = Loader(Recorded(tmp_path), 2, CPU)
    list(load(loader, range(5)))
    first, _ = loader_workers()
    os.kill(first.pid, signal.SIGKILL)
    first.join(5)
    assert list(load(loader, range(5, 9))) == [5, 6, 7, 8]


def test_without_workers_an_unexpected_error_is_raised_as_it_is(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.made = tmp_path / "nowhere" / "made"
    with pytest.raises(FileNotFoundError):
        list(load(Loader(recorded, 0, CPU), range(3)))


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(load(Loader(Recorded(tmp_path), 1, CPU), range(3)))
    assert torch.equal(torch.rand(3), expected)


def test_workers_leave_signals_to_the_training_process(tmp_path: Path) -> None:
    loading = load(Loader(Recorded(tmp_path), 2, CPU), range(50))
    first = [next(loading) for _ in range(5)]
    workers = [process.pid for process in loader_workers()]
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1", "USR2"):
        # By another process, as a terminal or a scheduler would send it.
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {server} {' '.join(map(str, workers))}"], check=True)
    assert first + list(loading) == list(range(50))


def test_workers_end_when_the_stream_is_left(tmp_path: Path) -> None:
    loader = Loader(Recorded(tmp_path), 2, CPU)
    loading = load(loader, range(50))
    next(loading)
    assert len(loader_workers()) == 2
    del loader, loading
    assert within(5, lambda: not loader_workers())


def test_workers_obey_a_termination_by_the_training_process(tmp_path: Path) -> None:
    loading = load(Loader(Recorded(tmp_path), 1, CPU), range(50))
    next(loading)
    (worker,) = loader_workers()
    worker.terminate()
    assert within(5, lambda: not worker.is_alive())


def test_a_lost_worker_is_an_error_in_place_of_its_batch(tmp_path: Path) -> None:
    *made, (_, last) = Loader(Recorded(tmp_path, lost_at=6), 2, CPU).load(planned(range(50)))
    # The loss is noticed at once, perhaps before batches that were already made are handed over; none is skipped.
    assert [int(batch.data) for _, batch in made] == list(range(len(made)))
    assert len(made) <= 6
    assert last.error is not None
    assert f"a loader worker failed at step {len(made)}: " in last.error


SCRIPT = """
    import multiprocessing, sys, time
    from pathlib import Path
    from tests.unit.data.test_stream_loader import CPU, Recorded, load
    from ecn_dist.data.loader import Loader

    if __name__ == "__main__":
        loading = load(Loader(Recorded(Path(sys.argv[1])), 2, CPU), range(50))
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
