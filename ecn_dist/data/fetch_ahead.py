"""Shards behind URLs, fetched in the plan's order before the loader asks for them."""

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ecn_dist.data.dataset import PictureDataset, Request
from ecn_dist.errors import UserError

AHEAD_SHARE = 4  # one part in so many of the cache is for what is fetched ahead, shared by the host's ranks


class FetchAhead:
    """A thread that walks the requests some way before the training does, and has the cache fetch what comes into use.

    It only saves time: what it could not fetch, the loader fetches, and reports. As much is fetched ahead as fits into
    this rank's share of the cache, and always one shard.
    """

    def __init__(self, dataset: PictureDataset, requests: Iterable[Request]) -> None:
        if dataset.reader.cache is None:
            raise ValueError("fetching ahead needs a cache")
        self._split = dataset.split
        self._cache = dataset.reader.cache
        self._requests = requests
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun says
        self._share_bytes = self._cache.limit_bytes // (AHEAD_SHARE * ranks)
        self._position = -1
        self._ended = False
        self._moved = threading.Condition()
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def reached(self, step: int) -> None:
        """The training is at `step`."""
        with self._moved:
            self._position = step
            self._moved.notify()

    def stop(self) -> None:
        """End the thread after the shard it is at."""
        with self._moved:
            self._ended = True
            self._moved.notify()

    def _run(self) -> None:
        once = replace(self._cache.patience, attempts=1)
        split = self._split
        ahead: list[tuple[int, int]] = []  # (step of first use, bytes)
        for step, shard in self._shards():
            with self._moved:
                while not self._ended:
                    ahead = [(first, size) for first, size in ahead if first > self._position]
                    if sum(size for _, size in ahead) + split.shards[shard].bytes <= self._share_bytes or not ahead:
                        break
                    self._moved.wait()
                if self._ended:
                    return
            try:
                self._cache.fetch(split.shard_path(shard), split.shards[shard], once)
            except UserError:
                continue  # the loader will meet it in its turn
            ahead.append((step, split.shards[shard].bytes))

    def _shards(self) -> Iterator[tuple[int, int]]:
        """(step, shard) of each shard's first use in each pass."""
        shard_of_row = self._split.members["shard"]
        seen: dict[int, int] = {}
        for request in self._requests:
            for shard in shard_of_row[request.rows_b].tolist():
                if seen.get(shard) != request.pass_number:
                    seen[shard] = request.pass_number
                    yield request.step, shard
