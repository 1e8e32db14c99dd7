"""Batches made by worker processes, in order, ahead of use, and their way to the device.

Workers come from a fork server, which imports this package once: they start in milliseconds, inherit neither threads
nor device memory of the training process, and are not its children, so that one that is killed is noticed where its
batch is missed, and not by a signal in the middle of a step. A signal to the whole process group (Ctrl-C, the end of a
job) is for the training process to answer: workers end when that one says so or is gone.

b samples of this rank, V views of each, H x W network input.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import tee

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ecn_dist.data import transforms
from ecn_dist.data.cache import FetchAhead
from ecn_dist.data.dataset import BOX, ROW, PictureDataset, RawBatch, fields_and_pixels
from ecn_dist.data.fetch import end_commands
from ecn_dist.data.plan import Step
from ecn_dist.data.transforms import ECN
from ecn_dist.errors import UserError

BATCHES_AHEAD = 2  # of each worker
ALIVE_SECONDS = 1.0  # between a worker's looks at whether the training process is there
SHARED_MEMORY = "/dev/shm"
WORKER_LOST = (RuntimeError, OSError, EOFError)  # the last two: it died while handing a batch over
NO_LABEL = -1


@dataclass
class Batch:
    """One rank's part of a global batch, on the stream's device. Where V > 1, a sample's views lie side by side."""

    images: Tensor  # (b V, 3, H, W) float32, normalised
    labels: Tensor  # (b V,) int64: as the plan says; NO_LABEL where it says nothing
    pids: Tensor  # (b V,) int64, for evaluation and diagnostics
    camids: Tensor  # (b V,) int64, the camera that took the picture, whatever style it appears in
    indices: Tensor  # (b V,) int64, exemplar index
    error: str | None = None  # why this batch must not be used; its tensors then hold zeros
    skipped: int = 0  # how many of these b samples stand in for one that could not be decoded; of this rank alone
    copied: torch.Event | None = None  # on an accelerator: when its tensors are there


@dataclass(eq=False, repr=False)
class Loader:
    """Makes batches of one range of steps after the other, by the same workers, which start with the first range."""

    dataset: PictureDataset  # pickled to the workers, so it should be small
    workers: int  # processes; 0 makes each batch here when it is asked for
    device: torch.device  # where batches are delivered
    samples: int = 0  # of the largest batch

    def __post_init__(self) -> None:
        accelerated = self.device.type != "cpu" and torch.accelerator.is_available()
        self._queue = torch.Stream(self.device) if accelerated else None  # of its own, for copies
        self._newest = _Newest()
        self._loader: DataLoader[RawBatch] | None = None
        self._made: Iterator[RawBatch] = iter(())

    def batches(
        self, steps: Callable[[], Iterable[Step]], labels: np.ndarray | None = None
    ) -> Generator[tuple[Step, Batch]]:
        """Each step with its batch, on the device. `labels` are (n,), of the split's rows.

        Off the CPU the next batch is already on its way, in a queue of its own, while one is used: nothing here waits
        for the device, and it waits for nothing that was not copied before. `steps` is called twice: for the workers,
        and for what is fetched ahead. Raises `UserError` for too little shared memory, or too small a cache.
        """
        cache = self.dataset.open()
        if self._loader is None:
            check_shared_memory(self.dataset.batch_bytes(self.samples), self.workers)
        made = self.load(steps())
        ahead = FetchAhead(self.dataset.split, cache, steps())
        on_the_way: list[tuple[Step, Batch]] = []
        try:
            for step, raw in made:
                on_the_way.append((step, self._send(raw, labels)))
                if len(on_the_way) > (self.device.type != "cpu"):
                    ahead.reached(on_the_way[0][0].number)
                    yield self._taken_over(*on_the_way.pop(0))
            for waiting in on_the_way:
                yield self._taken_over(*waiting)
        finally:
            ahead.reached(float("inf"))
            made.close()

    def _send(self, raw: RawBatch, labels: np.ndarray | None) -> Batch:
        size = self.dataset.height, self.dataset.width
        rows_b = fields_and_pixels(raw.data, *size)[0][ROW]
        if labels is None or raw.error:
            rows_b.fill_(NO_LABEL)
        else:
            rows_b.copy_(torch.from_numpy(labels[rows_b.numpy()]))
        with self._queue or nullcontext():
            fields, pixels_bHW3 = fields_and_pixels(raw.data.to(self.device, non_blocking=True), *size)
            images_b3HW = transforms.normalise_and_erase(pixels_bHW3, fields[BOX].T, self.dataset.augmentation or ECN)
            labels_b, pids_b, camids_b, indices_b = fields[:4].clone()
        copied = self._queue.record_event() if self._queue else None
        return Batch(images_b3HW, labels_b, pids_b, camids_b, indices_b, raw.error, raw.skipped, copied)

    def _taken_over(self, step: Step, batch: Batch) -> tuple[Step, Batch]:
        """The same, for the device's present queue, which waits for the batch to be there."""
        if self._queue and batch.copied:
            present = torch.accelerator.current_stream(self._queue.device)
            present.wait_event(batch.copied)
            for tensor in (batch.images, batch.labels):  # the others are parts of the same memory as the labels
                tensor.record_stream(present)
        return step, batch

    def load(self, steps: Iterable[Step]) -> Generator[tuple[Step, RawBatch]]:
        """Each step with its batch, in order. Steps are taken a few ahead.

        Where a worker ended unexpectedly (out of memory, killed), a batch with an error comes, and no more. Raises
        `RuntimeError` where another range was begun meanwhile, or the workers were ended.
        """
        asked, steps = tee(steps)
        self._newest.steps = asked
        self._begin()
        for step in steps:
            if self._newest.steps is not asked:
                raise RuntimeError("the workers have begun another range, or ended")
            try:
                batch = next(self._made)
            except WORKER_LOST as error:
                if not self.workers:
                    raise
                self.close()
                problem = f"a loader worker failed at step {step.number}: {error}"
                yield step, self.dataset.failed(len(step.rows_b), problem)
                return
            yield step, batch

    def close(self) -> None:
        """End the workers; `load` would start others."""
        self._loader, self._made, self._newest.steps = None, iter(()), ()

    def _begin(self) -> None:
        """Have the workers begin the newest range."""
        if self._loader is not None:
            with suppress(*WORKER_LOST):  # one since the last range
                self._made = iter(self._loader)
                return
        if self.workers:
            multiprocessing.set_forkserver_preload(["__main__", "ecn_dist.data.forkserver"])
        self._loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._newest,
            num_workers=self.workers,
            prefetch_factor=BATCHES_AHEAD if self.workers else None,
            persistent_workers=self.workers > 0,
            multiprocessing_context="forkserver" if self.workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            pin_memory=self._queue is not None,  # page-locked, for a fast way to the device
            generator=torch.Generator(),  # or it would draw from the global one, and the run depend on `workers`
        )
        self._made = iter(self._loader)


class _Newest:
    """The `DataLoader`'s sampler: each iteration of it is over the newest range."""

    steps: Iterable[Step] = ()

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """`UserError` where the batches that `workers` keep ready do not fit into shared memory: they would crash there."""
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    needed = batch_bytes * (workers * BATCHES_AHEAD + 1)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{workers} data workers need {needed >> 20} MiB of shared memory, and {SHARED_MEMORY} has {free >> 20} "
            "MiB free: give the container more (docker run --ipc=host, or --shm-size=8g), or lower --data.workers"
        )


def _start_worker(trainer: int, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A termination is obeyed from the training process alone; where no `sigtimedwait` tells who sent it, from anybody.
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
