"""Independent jobs over processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_connection
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecn_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Task = Callable[[str, int], Advance]  # begins a task of a progress bar: description and total

POLL_SECONDS = 0.1
WORTH_PROCESSES = 3000  # pictures that one process decodes and encodes in about the time that others take to start

_done: Any = None  # in a worker process: the samples done by all of them; negative when they shall stop


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(workers: int | None, pictures: int) -> int:
    """`workers` where it is given; else every core, or one process where starting more takes longer than the work."""
    if workers is not None:
        return workers
    return available_cores() if pictures > WORTH_PROCESSES else 1


def silent(description: str, total: int) -> Advance:
    """The `Task` of no progress bar."""
    return lambda count: None


@contextmanager
def progress_bar() -> Iterator[Task]:
    """Shows its tasks on standard error while it is open."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def task(description: str, total: int) -> Advance:
            identifier = bar.add_task(description, total=total)
            return lambda count: bar.advance(identifier, count)

        yield task


def run_jobs(
    function: Callable[[Job, Advance], Result], jobs: Sequence[Job], workers: int, progress: Advance
) -> list[Result]:
    """`[function(job, advance) for job in jobs]`, on `workers` processes.

    Args:
        function: top-level (it is pickled); calls `advance(n)` as it gets on.
        workers: one or none: everything runs in this process. No more are started than there are jobs.
        progress: called in this process with each advance.

    Raises:
        whatever a job raises; the other jobs are then stopped at their next advance. Workers end when this process
        does, however it ends.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        return [function(job, progress) for job in jobs]
    # Not forks of this process: it has threads, and what they hold stays locked in a fork. Forks of a server that has
    # imported what takes long; a process has one such server, so it is the one that loader workers come from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "ecn_dist.data.forkserver"])
    done = context.Value("q", 0)
    shown = 0
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(done,)) as pool:
        futures = [pool.submit(_call, function, job) for job in jobs]
        pending: set[Future[Result]] = set(futures)
        try:
            while pending:
                ended, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                reached = done.value
                progress(reached - shown)
                shown = reached
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} worker processes ended unexpectedly. The system may have killed it for lack of "
                "memory: try fewer with --workers"
            ) from error
        except BaseException:
            done.value = -(2**62)
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class _Stopped(Exception):
    """Another job failed."""


def _start_worker(done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and says so by the count
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fork server disregards it; the pool ends its workers with it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_connection([parent.sentinel])
        os._exit(1)


def _call(function: Callable[[Job, Advance], Result], job: Job) -> Result:
    return function(job, _advance)


def _advance(count: int) -> None:
    with _done.get_lock():
        if _done.value < 0:
            raise _Stopped
        _done.value += count
