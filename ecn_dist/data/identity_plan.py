"""P x K batches: P identities (or clusters) and K pictures of each, an endless sequence planned for an epoch.

The identities come in seeded rounds of all of them; so do the pictures of an identity in the turns that it gets. Where
a round ends inside a batch (or a turn), what was in that batch comes later in the next round, so an identity comes once
in a batch, and a picture once in a turn where its identity has K. In a turn the cameras that were taken least come
first. A picture's occurrence number is the round that it comes in.

Random orders are addressed by label and exemplar index, and ties go to the lower ones: the order in which pictures are
stored plays no part.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import count

import numpy as np

from ecn_dist.data.draws import Draws
from ecn_dist.data.plan import STAND_INS, Step
from ecn_dist.errors import UserError

REMEDY = "take fewer identities a batch, or pack more of them"


@dataclass(eq=False, repr=False)
class IdentityPlan:
    """The P x K batches of one epoch. Raises `UserError` where there are fewer than P identities."""

    labels: np.ndarray  # (n,) integers, the identity of each row of the split; -1 takes no part
    indices: np.ndarray  # (n,) of the rows, as `camids`
    camids: np.ndarray
    _: KW_ONLY
    identities: int  # P
    instances: int  # K
    seed: int
    domain: str
    epoch: int  # another one gives another sequence
    remedy: str = REMEDY  # the end of the error about too few identities

    def __post_init__(self) -> None:
        if min(self.identities, self.instances) < 1:
            found = f"{self.identities} identities x {self.instances} pictures"
            raise UserError(f"{found} are no batch: both must be at least 1")
        self.labels = np.asarray(self.labels, dtype=np.int64)
        self.global_batch_size = self.streams = self.identities * self.instances
        rows = np.flatnonzero(self.labels >= 0)
        rows = rows[np.lexsort((self.indices[rows], self.labels[rows]))]
        self._numbers, starts = np.unique(self.labels[rows], return_index=True)
        if len(self._numbers) < self.identities:
            found = f"{len(self._numbers)} identities are fewer than the {self.identities} of a batch"
            raise UserError(f"{self.domain}: {found}; {self.remedy}")
        self._members = np.split(rows, starts[1:])  # of each identity, by exemplar index
        self._identity_draws = Draws(self.seed, self.domain, "identities")
        self._picture_draws = Draws(self.seed, self.domain, "instances")
        self._sequence = self._all_turns()
        self._turns: list[tuple[np.ndarray, np.ndarray]] = []  # the sequence as far as it was asked for
        self._lock = threading.Lock()

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Step:
        """Step `step` of the epoch: see `Plan`. A rank has whole identities where P divides by the ranks."""
        first = step * self.identities
        with self._lock:
            while len(self._turns) < first + self.identities:
                self._turns.append(next(self._sequence))
        rows_B, occurrences_B = map(np.concatenate, zip(*self._turns[first : first + self.identities], strict=True))
        b = self.global_batch_size // world_size
        part = slice(rank * b, (rank + 1) * b)
        return Step(rows_B[part], occurrences_B[part], self.epoch, step)

    def stand_ins(self, row: int) -> np.ndarray:
        """The other pictures of the identity, from the next exemplar index on."""
        members = self._members[np.searchsorted(self._numbers, self.labels[row])]
        at = int(np.flatnonzero(members == row)[0])
        return np.roll(members, -at)[1 : STAND_INS + 1]

    def _all_turns(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(K,) rows and (K,) occurrence numbers of one identity after the other."""
        turns = [self._turns_of(members) for members in self._members]
        order: list[int] = []
        for number in count():
            begun = number * len(turns) % self.identities  # identities of the last round in the batch that goes on
            in_batch = set(order[len(order) - begun :])
            drawn = self._identity_draws.order((number, self._numbers, self.epoch)).tolist()
            first = [identity for identity in drawn if identity not in in_batch][: self.identities - begun]
            order = first + [identity for identity in drawn if identity not in first]
            for identity in order:
                yield next(turns[identity])

    def _turns_of(self, members: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cameras = self.camids[members].tolist()
        to_come: list[int] = []  # places in `members` that this round still has, in drawn order
        number = -1
        while True:
            turn: list[int] = []
            occurrences: list[int] = []
            taken: Counter[int] = Counter()  # pictures of each camera
            while len(turn) < self.instances:
                if not to_come:
                    number += 1
                    to_come = self._picture_draws.order((number, self.indices[members], self.epoch)).tolist()
                fresh = [place for place in to_come if place not in turn] or to_come
                place = min(fresh, key=lambda place: taken[cameras[place]])  # the first drawn, among equals
                to_come.remove(place)
                taken[cameras[place]] += 1
                turn.append(place)
                occurrences.append(number)
            yield members[turn], np.array(occurrences)
