"""Batches made by worker processes, in order, ahead of use.

Workers come from a fork server, which imports this package once: they start in milliseconds, inherit neither threads
nor device memory of the training process, and are not its children, so that one that is killed is noticed where its
batch is missed, and not by a signal in the middle of a step.

A signal to the whole process group (Ctrl-C, a scheduler that announces the end of a job) is for the training process
to answer, which may want to save a checkpoint first. Workers disregard it, and end when the training process says so
or is gone.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader

from ecn_dist.data.dataset import PictureDataset, RawBatch, Request
from ecn_dist.data.fetch import end_commands
from ecn_dist.errors import UserError

BATCHES_AHEAD = 2  # of each worker
ALIVE_SECONDS = 1.0  # between a worker's looks at whether the training process is there
SHARED_MEMORY = "/dev/shm"
WORKER_LOST = (RuntimeError, OSError, EOFError)  # the last two: it died while handing a batch over


class Loader:
    """Makes batches of one range of requests after the other, by the same workers, which start with the first range.

    Args:
        dataset: pickled to the workers, so it should be small.
        workers: processes; 0 makes each batch here when it is asked for.
        pin_memory: copy batches to page-locked memory, for a fast way to an accelerator.
    """

    def __init__(self, dataset: PictureDataset, workers: int, pin_memory: bool) -> None:
        self._dataset, self._workers, self._pin_memory = dataset, workers, pin_memory
        self._sampler = _Sampler()
        self._loader: DataLoader[RawBatch] | None = None
        self._made: Iterator[RawBatch] | None = None

    def load(self, requests: Iterable[Request]) -> Generator[tuple[Request, RawBatch]]:
        """Each request with its batch, in order. Requests are taken a few ahead.

        Where a worker ended unexpectedly (out of memory, killed), a batch with an error comes, and no more.

        Raises:
            RuntimeError: another range was begun meanwhile; this one cannot go on.
        """
        if not self._workers:
            for request in requests:
                batch = self._dataset[request]
                yield request, batch._replace(data=batch.data.pin_memory()) if self._pin_memory else batch
            return
        asked: deque[Request] = deque()
        self._sampler.requests, self._sampler.asked = requests, asked
        self._begin()
        while self._made is not None:
            if self._sampler.asked is not asked:
                raise RuntimeError("the workers have begun another range")
            try:
                batch = next(self._made)
            except StopIteration:
                return
            except WORKER_LOST as error:
                self.close()
                batch = self._dataset.failed(
                    len(asked[0].rows_b), f"a loader worker failed at step {asked[0].step}: {error}"
                )
            yield asked.popleft(), batch

    def close(self) -> None:
        """End the workers; `load` would start others."""
        self._loader = self._made = None

    def _begin(self) -> None:
        """Have the workers begin the newest range."""
        if self._loader is not None:
            try:
                self._made = iter(self._loader)
                return
            except WORKER_LOST:
                self.close()  # a worker was lost since the last range
        start_fork_server()
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._sampler,
            collate_fn=_as_made,
            num_workers=self._workers,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=self._pin_memory,
            persistent_workers=True,
            multiprocessing_context="forkserver",
            worker_init_fn=partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # or it would draw from the global one, and the run depend on `workers`
        )
        self._made = iter(self._loader)


class _Sampler:
    """The `DataLoader`'s: each iteration of it asks for the newest range, and notes what was asked for."""

    requests: Iterable[Request]
    asked: deque[Request]

    def __iter__(self) -> Iterator[Request]:
        asked = self.asked
        for request in self.requests:
            asked.append(request)
            yield request


def start_fork_server() -> None:
    """Start the server that `load` takes its workers from: its imports then run beside what this process does."""
    multiprocessing.set_forkserver_preload(["__main__", "ecn_dist.data.forkserver"])
    forkserver.ensure_running()


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """`UserError` where the batches that `workers` keep ready do not fit into shared memory: they would crash there."""
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    needed = batch_bytes * (workers * BATCHES_AHEAD + 1)
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{workers} data workers need {needed >> 20} MiB of shared memory, and {SHARED_MEMORY} has "
            f"{free >> 20} MiB free: give the container more (docker run --ipc=host, or --shm-size=8g), or lower "
            "--data.workers"
        )


def _as_made(batch: Any) -> Any:
    return batch


def _start_worker(trainer: int, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A termination is obeyed from the training process alone; only `sigtimedwait` tells who sent it. Without it (macOS)
    # it is obeyed from anybody.
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_when_told, args=(trainer,), daemon=True).start()


def _end_when_told(trainer: int) -> None:
    parent = multiprocessing.parent_process()  # the training process, though the fork server made this one
    while parent is None or parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(ALIVE_SECONDS)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, ALIVE_SECONDS)) and received.si_pid == trainer:
            break
    end_commands()
    os._exit(0)
