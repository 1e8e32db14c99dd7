"""Who is still there: every rank's heartbeat, through the store in which the process group met.

A collective whose partner is gone or hangs does not say which rank that is; heartbeats do, with its host and where it
was last heard of. Every rank sends one each half second and watches the next rank's; all are read after a failure.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from ecn_dist.errors import printable_lines

EXIT_RANK_LOST = 69  # EX_UNAVAILABLE of sysexits.h
INTERVAL_SECONDS = 0.5
RANKS_AN_INTERVAL = 500  # with more ranks beats are rarer, for the store's sake
STORE_SECONDS = 5.0  # for one answer of the store
SURE_SECONDS = 1.5  # without a beat before a rank counts as silent, once something has failed
LATEST_SECONDS = 4.0  # the same where several are silent: this host may only be busy
GRACE_SECONDS = 10.0  # for this rank to end by itself, once another has announced a failure

_RUNNING, _ENDED = "running", "ended"
_ANNOUNCED = "announced"  # the store's key for the first failure that a rank announced
log = logging.getLogger("ecn_dist")


@dataclass
class Position:
    """Where this rank is, for the error of whoever misses it. Cheap to write, at every collective."""

    collective: str = "the start"  # the newest one
    count: int = 0  # of collectives: the same on all ranks that are equally far
    step: int | None = None  # of training

    def __str__(self) -> str:
        return self.collective if self.step is None else f"{self.collective} at step {self.step}"


position = Position()


def entering(collective: str) -> None:
    """Note the collective that comes next. For those that run outside `collectives`, such as a gradient exchange."""
    position.collective = collective
    position.count += 1


def at_step(step: int) -> None:
    """Note the training step that begins."""
    position.step = step


@dataclass(frozen=True)
class Failure:
    """What the first rank that found one tells the others."""

    text: str
    silent: Sequence[int] = ()  # the ranks that it misses


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself."""

    count: int
    state: str  # running, ended, or the error it ended by
    where: str  # its newest collective, and the step
    collectives: int  # so many were there up to this one
    host: str
    clock: str  # when it said so, by its own clock


class Heartbeats:
    """This rank's heartbeat, and its watch over the others. On one rank there is nothing to make one for."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        """`store` is for a thread of its own. A time-out's silence of it or of the next rank ends this process."""
        self.rank, self.world_size, self.timeout_seconds, self._store = rank, world_size, timeout_seconds, store
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._interval = INTERVAL_SECONDS * max(1.0, world_size / RANKS_AN_INTERVAL)
        self._next = (rank + 1) % world_size
        self._state = _RUNNING
        self._announcement: Failure | None = None  # of this rank
        self._beats: dict[int, Beat] = {}
        self._next_heard = self._answered = time.monotonic()  # news of the next rank; an answer of the store
        self._told: Failure | None = None  # what another rank announced, or this one
        self._told_at = 0.0
        self._reads_all, self._rounds = False, 0
        self._stop = threading.Event()
        self._ending = threading.Lock()  # held by the thread that explains the end
        self._exchange_thread = threading.Thread(target=self._exchange_always, name="heartbeat", daemon=True)
        self._exchange_thread.start()
        threading.Thread(target=self._judge_always, name="heartbeat-judge", daemon=True).start()

    def stop(self) -> None:
        """Say farewell: this rank ends as it should, or as it has announced."""
        self._state = _ENDED if self._state == _RUNNING else self._state
        self._stop.set()
        self._exchange_thread.join(timeout=2 * self._interval)

    def announce(self, error: str) -> None:
        """Let the other ranks know that this one ends, and by what error."""
        self._state = error
        self._announcement = Failure(f"rank {self.rank} on host {socket.gethostname()} ended in {position}: {error}")

    def explain(self, error: str) -> tuple[str, bool]:
        """Why a collective failed here with `error`, and whether this rank tells the console. Takes some seconds."""
        with self._ending:
            failure = self._find_out()
            self._state, self._announcement = error, failure
            return f"rank {self.rank} could not finish {position} ({error}): {failure.text}", self._speaks(failure)

    def _speaks(self, failure: Failure) -> bool:
        """Whether this is the first of the ranks that are still there, on each side where the ranks are cut in two."""
        if self._store_is_silent():
            return os.environ.get("LOCAL_RANK", "0") == "0"
        return not any(rank < self.rank and rank not in failure.silent for rank in self._beats)

    def _find_out(self) -> Failure:
        self._reads_all, self._rounds = True, 0
        started, first, silent = time.monotonic(), dict[int, Beat](), list[int]()
        while (waited := time.monotonic() - started) < LATEST_SECONDS:
            time.sleep(0.1)
            if self._told:
                return self._told
            if self._store_is_silent():
                return self._lost_store()
            if not self._rounds:
                started = time.monotonic()
                continue
            first, now = first or self._beats, self._beats
            silent = [r for r in first if first[r].state == _RUNNING and now[r].count == first[r].count]
            if len(silent) <= 1 and waited > SURE_SECONDS:
                break
        if silent:
            return self._lost_ranks(sorted(silent))
        fewest = min((beat.collectives for beat in self._beats.values()), default=0)
        late = [r for r, beat in sorted(self._beats.items()) if beat.collectives == fewest]
        places = [f"rank {r} on host {self._beats[r].host}, not beyond {self._beats[r].where}" for r in late[:4]]
        return Failure(f"all other ranks send heartbeats, and late or hanging is: {'; '.join(places)}")

    def _lost_ranks(self, silent: list[int]) -> Failure:
        more = f"; and {len(silent) - 4} more" if len(silent) > 4 else ""
        heard = "; ".join(map(self._last_heard, silent[:4]))
        return Failure(f"no heartbeat comes any more from {heard}{more}", silent)

    def _lost_store(self) -> Failure:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        seconds = time.monotonic() - self._answered
        return Failure(
            f"the store at {place} (MASTER_ADDR, the host of rank 0) has not answered for {seconds:.0f} s: that host "
            f"or the way to it is lost. Of the next rank was heard: {self._last_heard(self._next)}"
        )

    def _last_heard(self, rank: int) -> str:
        if beat := self._beats.get(rank):
            return f"rank {rank} on host {beat.host}, last heard of at {beat.clock} in {beat.where}"
        return f"rank {rank}, never heard of"

    def _store_is_silent(self) -> bool:
        return time.monotonic() - self._answered > STORE_SECONDS + 2 * self._interval

    def _exchange_always(self) -> None:
        count = 0
        while True:
            last = self._stop.is_set()
            try:
                self._exchange(count)
                self._answered = time.monotonic()
            except RuntimeError as error:  # the store's; that it does not answer is judged by the time
                log.debug("the store does not answer: %s", error)
            if last:
                return
            count += 1
            self._stop.wait(self._interval)

    def _exchange(self, count: int) -> None:
        beat = Beat(count, self._state, str(position), position.count, socket.gethostname(), time.strftime("%H:%M:%S"))
        self._store.set(f"beat-{self.rank}", json.dumps(asdict(beat)))
        if self._announcement and not self._store.check([_ANNOUNCED]):
            self._store.set(_ANNOUNCED, json.dumps(asdict(self._announcement)))
        all_ranks = self._reads_all
        others = set(range(self.world_size)) - {self.rank} if all_ranks else {self._next}
        read = {rank: Beat(**told) for rank in others if (told := self._read(f"beat-{rank}"))}
        if read.get(self._next) not in (None, self._beats.get(self._next)):
            self._next_heard = time.monotonic()
        self._beats = self._beats | read
        if self._told is None and (told := self._read(_ANNOUNCED)):
            self._told, self._told_at = Failure(**told), time.monotonic()
        self._rounds += all_ranks

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _judge_always(self) -> None:
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            beat = self._beats.get(self._next)
            next_lost = now - self._next_heard > self.timeout_seconds and (beat is None or beat.state == _RUNNING)
            store_lost = now - self._answered > self.timeout_seconds
            told = self._told is not None and now - self._told_at > GRACE_SECONDS
            if (next_lost or store_lost or told) and self._ending.acquire(blocking=False):
                # Where the store is silent no heartbeat can come: that the next rank's did not tells nothing.
                no_store = store_lost or self._store_is_silent()
                failure = self._told or (self._lost_store() if no_store else self._lost_ranks([self._next]))
                self._announcement = failure
                self._stop.set()
                self._exchange_thread.join(timeout=2 * self._interval)
                text = f"rank {self.rank} gave up waiting in {position}: {failure.text}"
                report(text, to_console=self._speaks(failure))
                exit_at_once(EXIT_RANK_LOST)


def exit_at_once(status: int) -> NoReturn:
    """End this process without waiting for any of its threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report(error: str, *, to_console: bool) -> None:
    """Put an error that ends this rank into its log and torchrun's report, and perhaps on standard error."""
    if log.handlers:
        log.error(error, extra={"file_only": True})
    if to_console:
        print(f"error: {printable_lines(error)}", file=sys.stderr, flush=True)
    tell_torchrun(error)


def tell_torchrun(error: str) -> None:
    """Give torchrun the line that it shows for this rank at the end: as its `record` does, without the call stack."""
    handler, error = ErrorHandler(), printable_lines(error)
    if path := handler._get_error_file_path():
        message = {"message": error, "extraInfo": {"py_callstack": error, "timestamp": str(int(time.time()))}}
        handler._write_error_file(path, json.dumps({"message": message}))
