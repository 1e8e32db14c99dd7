"""Independent jobs over processes, with a progress bar. Imports only errors, so that every tool can use it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from ecn_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

WORTH_PROCESSES = 3000  # pictures that one process decodes and encodes in about the time that others take to start


def choose_workers(workers: int | None, pictures: int) -> int:
    """`workers` where it is given; else every core, or one process where starting more takes longer than the work."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if pictures > WORTH_PROCESSES else 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, description: str = "working"
) -> list[Result]:
    """`[function(job) for job in jobs]`, on `workers` processes, with a bar on a terminal's standard error.

    `function` is pickled: top-level, or a partial of such a function. With one worker, or one job, all runs in this
    process. Raises what a job raises, or `UserError` where a worker ended unexpectedly.
    """

    def watched(results: Iterable[Result]) -> list[Result]:
        console = Console(stderr=True)
        return list(track(results, description, len(jobs), console=console, disable=not console.is_terminal))

    workers = min(workers, len(jobs))
    if workers <= 1:
        return watched(map(function, jobs))
    # Not forks of this process: it has threads, and what they hold stays locked in a fork. Forks of a server that has
    # imported what takes long; a process has one such server, so it is the one that loader workers come from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "ecn_dist.data.forkserver"])
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            return watched(pool.map(function, jobs))
        except BrokenProcessPool as error:
            problem = f"one of {workers} worker processes ended unexpectedly, perhaps killed for lack of memory"
            raise UserError(f"{problem}; try fewer with --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the fork server disregards them
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
