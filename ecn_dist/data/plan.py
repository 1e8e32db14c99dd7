"""Which sample comes when: what a plan is, and the plan of passes over a split.

A pass is planned from the shards' sample counts, the seed and the pass number alone. Its shards, in seeded order, form
one sequence of N samples, rotated by a seeded offset. It is cut into S equal streams, and each is shuffled within
seeded windows. A global batch takes B / S samples of every stream, in stream order, and rank r owns the streams from
r S / W to (r + 1) S / W. So all ranks take the same steps, with batches that depend on no ranks or workers; a rank
reads only what its streams cover, a few shards at a time; and a sample comes at most once a pass. Fewer than B are left
out, others in every pass: N mod S, and what does not fill a batch at the end of each stream.

N samples, B a global batch, S streams, W ranks, L = N // S samples of one stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ecn_dist.data.draws import Draws
from ecn_dist.errors import UserError

DEFAULT_WINDOW = 65_536
SHARDS_PER_WINDOW = 4
STAND_INS = 16  # that are tried for a picture that cannot be decoded


class Step(NamedTuple):
    """What a rank shows in one step: b samples, in batch order."""

    rows_b: np.ndarray  # int64, of the split's members
    occurrences_b: np.ndarray  # int64, how often the sample came before in this pass
    pass_number: int  # the pass (or epoch): with index and occurrence, the address of a sample's random numbers
    number: int = 0  # of the step
    stand_ins: Sequence[np.ndarray] = ()  # of each sample, see `Plan.stand_ins`; none where nothing may be replaced


class Plan(Protocol):
    """Which samples come in which step: a function of the split, the seed and the step, and of no rank or worker."""

    seed: int  # of the run
    domain: str  # in errors and in the addresses of random numbers: two streams of a run have different ones
    global_batch_size: int  # B, samples of a step over all ranks
    streams: int  # S, the parts that a batch is made of, see `check_batch`

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64, what the batches' `labels` say of each row; None where nothing is known."""

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Step:
        """The part of `rank`; the ranks' parts, one after the other, are the global batch. Threads may call it."""

    def stand_ins(self, row: int) -> np.ndarray:
        """Rows to show in place of `row` where its picture cannot be decoded, the first that can be."""


def check_batch(global_batch_size: int, streams: int, world_size: int = 1) -> None:
    """The one rule of divisibility: W divides S, and S divides B; a batch without streams has S = B.

    Else raises `UserError`, which names the numbers that would do, the same on all ranks.
    """
    if min(global_batch_size, streams) < 1:
        raise UserError(f"global_batch_size ({global_batch_size}) and data.streams ({streams}) must be at least 1")
    low = [d for d in range(1, math.isqrt(global_batch_size) + 1) if global_batch_size % d == 0]
    divisors = sorted({*low, *(global_batch_size // d for d in low)})
    if global_batch_size % world_size:
        near, some = max(1, round(global_batch_size / world_size)) * world_size, ", ".join(map(str, divisors))
        problem = f"{global_batch_size} does not divide by {world_size} ranks; {near} would, or use {some} ranks"
        raise UserError(f"global_batch_size: {problem}", on_all_ranks=True)
    if streams % world_size or global_batch_size % streams:
        problem = f"must divide global_batch_size ({global_batch_size}) and be a multiple of the ranks ({world_size})"
        fitting = ", ".join(str(d) for d in divisors if d % world_size == 0)
        raise UserError(f"data.streams: {streams} {problem}; these would do: {fitting}", on_all_ranks=True)


@dataclass(eq=False, repr=False)
class PassPlan:
    """The order of every pass over one split.

    Raises `UserError` where B is not a multiple of S, or there are fewer than B samples.
    """

    shard_samples: Sequence[int]  # in the split's order; their concatenation numbers the rows
    global_batch_size: int
    streams: int  # the order depends on it, so a run keeps it when its number of ranks changes
    seed: int
    domain: str
    # How many samples are shuffled together, over all streams; of one stream never less than `SHARDS_PER_WINDOW` mean
    # shards, so that shards are mixed even where they are large.
    window: int = DEFAULT_WINDOW
    labels: np.ndarray | None = None
    sized_by: str = "global_batch_size"  # the option that sets B, for errors

    def __post_init__(self) -> None:
        check_batch(self.global_batch_size, self.streams)
        self._sizes = np.asarray(self.shard_samples, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        if self.num_samples < self.global_batch_size:
            raise UserError(
                f"{self.domain}: {self.num_samples} training pictures are fewer than one batch of "
                f"{self.global_batch_size}; lower {self.sized_by}, or pack more pictures"
            )
        self.stream_length = self.num_samples // self.streams
        mean_shard = -(-self.num_samples // len(self._sizes))
        span = max(-(-self.window // self.streams), SHARDS_PER_WINDOW * mean_shard)
        # Windows of nearly equal length: a short one at the end would hardly be mixed.
        self.num_windows = max(1, round(self.stream_length / span))
        self._window_edges = np.arange(self.num_windows + 1) * self.stream_length // self.num_windows
        self._row_starts = np.cumsum(self._sizes) - self._sizes
        self._draws = {purpose: Draws(self.seed, self.domain, purpose) for purpose in ("offset", "shards", "window")}
        self._sequence = lru_cache(3)(self._make_sequence)
        self._order = lru_cache(4 * self.streams)(self._make_order)

    @property
    def steps_per_pass(self) -> int:
        """Global batches in a pass, on every rank."""
        return self.stream_length // (self.global_batch_size // self.streams)

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Step:
        """Step `step`, counted over all passes: see `Plan`. A sample comes once a pass, so its occurrence is 0."""
        pass_number, step_of_pass = divmod(step, self.steps_per_pass)
        own, per_stream = self.streams // world_size, self.global_batch_size // self.streams
        taken = step_of_pass * per_stream + np.arange(per_stream)
        places = [
            stream * self.stream_length + self._shuffled(pass_number, stream, taken)
            for stream in range(rank * own, (rank + 1) * own)
        ]
        rows_b = self._rows_at(pass_number, np.concatenate(places))
        return Step(rows_b, np.zeros_like(rows_b), pass_number, step)

    def stand_ins(self, row: int) -> np.ndarray:
        """The samples stored after `row`; the first follows the last."""
        return (row + np.arange(1, STAND_INS + 1)) % self.num_samples

    def _shuffled(self, pass_number: int, stream: int, places: np.ndarray) -> np.ndarray:
        """Places 0 .. L - 1 of the shuffled stream -> places of the stream as it was cut."""
        windows = np.searchsorted(self._window_edges, places, side="right") - 1
        result = np.empty_like(places)
        for window in range(windows[0], windows[-1] + 1):  # one, or two where a batch spans the boundary
            inside = windows == window
            start = self._window_edges[window]
            result[inside] = start + self._order(pass_number, stream, window)[places[inside] - start]
        return result

    def _make_order(self, pass_number: int, stream: int, window: int) -> np.ndarray:
        length = int(self._window_edges[window + 1] - self._window_edges[window])
        return self._draws["window"].permutation(length, (window, stream, pass_number))

    def _rows_at(self, pass_number: int, places: np.ndarray) -> np.ndarray:
        """Places in the pass's rotated sequence -> rows of the members."""
        shards, starts, offset = self._sequence(pass_number)
        places = (places + offset) % self.num_samples
        at = np.searchsorted(starts, places, side="right") - 1
        return self._row_starts[shards[at]] + places - starts[at]

    def _make_sequence(self, pass_number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The pass's order of shards, where each starts in that order, and the offset of the first stream."""
        shards = self._draws["shards"].permutation(len(self._sizes), (0, 0, pass_number))
        sizes = self._sizes[shards]
        return shards, np.cumsum(sizes) - sizes, self._draws["offset"].integer(self.num_samples, (0, 0, pass_number))
