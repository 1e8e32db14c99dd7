"""Real ranks for tests: worker processes in a gloo group, started once a session and reused.

A test hands a top-level function to `Ranks.run`; it runs on every rank, and a failure on any rank fails the test with
that rank's traceback. No ports: the group meets through a file.
"""

import ctypes
import gc
import multiprocessing
import queue
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240.0  # for a busy machine, and below pytest's own


# What ranks import; with what loader workers do, as a process has one fork server.
PRELOAD = (
    *("__main__", "pytest", "ecn_dist.data.forkserver", "ecn_dist.train", "ecn_dist.evaluate", "ecn_dist.label"),
    *("ecn_dist.methods.cluster.method", "ecn_dist.methods.ecn.method", "tests.reference", "tests.reference_clusters"),
)


def start_fork_server() -> None:
    """Start the server that ranks come from, if it does not run. It imports once what every rank needs."""
    multiprocessing.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()


def _worker(rank: int, world_size: int, store: str, tasks: Any, results: Any) -> None:
    import os

    import torch
    import torch.distributed as dist

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # which the fork server ignores
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    gc.freeze()  # what is imported already is not looked through after every test
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (task := tasks.get()) is not None:
        function, args, kwargs = task
        try:
            results.put((rank, None, function(*args, **kwargs)))
        except BaseException:  # also a test's own SystemExit: the parent shows it
            results.put((rank, traceback.format_exc(), None))
        del task, function, args, kwargs
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # ranks are kept, and what a large test freed would be kept with them
    dist.destroy_process_group()


class Ranks:
    """`world_size` processes in one gloo group, one thread each."""

    def __init__(self, world_size: int) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(world_size)]
        self._processes = [
            context.Process(target=_worker, args=(rank, world_size, store, tasks, self._results), daemon=False)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS, **kwargs: Any) -> list:
        """Call `function(*args, **kwargs)` on every rank; the results in rank order. Arguments are pickled."""
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(values) + len(failures) < self.world_size:
            try:
                rank, failure, value = self._results.get(timeout=timeout)
            except queue.Empty:
                self.stop()
                missing = sorted(set(range(self.world_size)) - set(values) - set(failures))
                failures |= dict.fromkeys(missing, f"no answer in {timeout:g} s")
                break
            if failure:
                failures[rank] = failure
                timeout = min(timeout, 10.0)  # the others may wait for this rank in a collective
            else:
                values[rank] = value
        if failures:
            self.stop()  # the group may be out of step: the next test starts a fresh one
            raise AssertionError("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())))
        return [values[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the workers: politely, then by force."""
        for tasks in self._tasks:
            tasks.put(None)
        wait([process.sentinel for process in self._processes], timeout=5.0)
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class RankPool:
    """One `Ranks` for each world size asked for, kept for the session."""

    def __init__(self) -> None:
        self._pool: dict[int, Ranks] = {}

    def __call__(self, world_size: int) -> Ranks:
        if world_size not in self._pool or not self._pool[world_size].alive:
            self._pool[world_size] = Ranks(world_size)
        return self._pool[world_size]

    def stop(self) -> None:
        for ranks in self._pool.values():
            if ranks.alive:
                ranks.stop()
