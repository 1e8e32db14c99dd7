"""Shards behind URLs, fetched in the plan's order before the loader asks for them."""

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ecn_dist.data.cache import ShardCache
from ecn_dist.data.dataset import Request
from ecn_dist.data.index import SplitIndex
from ecn_dist.errors import UserError

AHEAD_SHARE = 4  # one part in so many of the cache is for what is fetched ahead, shared by the host's ranks


class FetchAhead:
    """A thread that walks the requests some way before the training does, and has the cache fetch what comes into use.

    It only saves time: what it could not fetch, the loader fetches, and reports. As much is fetched ahead as fits into
    this rank's share of the cache, and always one shard.
    """

    def __init__(self, split: SplitIndex, cache: ShardCache, requests: Iterable[Request]) -> None:
        self._split, self._cache, self._requests = split, cache, requests
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun says
        self._share_bytes = cache.limit_bytes // (AHEAD_SHARE * ranks)
        self._position = -1.0
        self._moved = threading.Condition()
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def reached(self, step: float) -> None:
        """The training is at `step`."""
        with self._moved:
            self._position = step
            self._moved.notify()

    def stop(self) -> None:
        """End the thread after the shard it is at."""
        self.reached(float("inf"))

    def _run(self) -> None:
        once = replace(self._cache.patience, attempts=1)
        ahead: list[tuple[int, int]] = []  # (step of first use, bytes)
        for step, shard in self._first_uses():
            info = self._split.shards[shard]
            with self._moved:
                while ahead := [(first, size) for first, size in ahead if first > self._position]:
                    if sum(size for _, size in ahead) + info.bytes <= self._share_bytes:
                        break
                    self._moved.wait()
                if self._position == float("inf"):
                    return
            try:
                self._cache.fetch(self._split.shard_path(shard), info, once)
            except UserError:
                continue  # the loader will meet it in its turn
            ahead.append((step, info.bytes))

    def _first_uses(self) -> Iterator[tuple[int, int]]:
        """(step, shard) of each shard's first use in each pass."""
        shard_of_row = self._split.members["shard"]
        seen: dict[int, int] = {}
        for request in self._requests:
            for shard in shard_of_row[request.rows_b].tolist():
                if seen.get(shard) != request.pass_number:
                    seen[shard] = request.pass_number
                    yield request.step, shard
