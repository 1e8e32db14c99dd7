"""The batches of each step: one stream for each feed of the method, opened where the run begins or continues."""

import time
from collections.abc import Callable, Iterator

from ecn_dist.data import Batch, TrainStream
from ecn_dist.methods.base import Feed, Step
from ecn_dist.training.timeline import Timeline

# `open_stream(feed, first_step, last_step)`, steps counted from the feed's own first one.
OpenStream = Callable[[Feed, int, int], TrainStream]


class Feeder:
    """Hands out the batches of the steps of a run, in order.

    A feed of the epochs on the source alone that the method goes on with keeps its place in its pass; all others begin
    with the method's epoch 0.
    """

    def __init__(self, alone: Feed | None, feeds: tuple[Feed, ...], timeline: Timeline, open_stream: OpenStream):
        """`alone` is the feed of the epochs on the source alone, where there are any."""
        self.alone = alone
        self.feeds = feeds
        self.timeline = timeline
        self._open_stream = open_stream
        self._opened: dict[str, Iterator[Batch]] = {}
        self._source_only: bool | None = None

    def of(self, at: Step) -> tuple[Feed, ...]:
        """The feeds of a step."""
        if not at.source_only:
            return self.feeds
        assert self.alone is not None
        return (self.alone,)

    def images(self, at: Step) -> int:
        """Samples in a step's batches, over all ranks."""
        return sum(feed.batch_size for feed in self.of(at))

    def next(self, at: Step) -> tuple[dict[str, Batch], float]:
        """The batches of step `at` by the feeds' names, and the seconds waited for them."""
        if at.source_only != self._source_only:
            self._begin_phase(at)
        started = time.monotonic()
        batches = {feed.name: next(self._opened[feed.name]) for feed in self.of(at)}
        return batches, time.monotonic() - started

    def _begin_phase(self, at: Step) -> None:
        going_on = self.alone in self.feeds
        if self._source_only is None and (at.source_only or going_on) and self.alone is not None:
            last = self.timeline.total_steps if going_on else self.timeline.source_only_steps
            self._opened[self.alone.name] = iter(self._open_stream(self.alone, at.number, last))
        if not at.source_only:
            before = self.timeline.source_only_steps
            for feed in self.feeds:
                if feed != self.alone or not going_on:
                    steps = at.number - before, self.timeline.total_steps - before
                    self._opened[feed.name] = iter(self._open_stream(feed, *steps))
        self._source_only = at.source_only
