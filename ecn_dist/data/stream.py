"""Batches for training and evaluation.

A batch is addressed by its step alone: the plan says which samples, their draws how they look. So the batches are the
same for any number of ranks and workers, resuming is only another first step, and the end of a pass is nothing
special: while its last batches train, the first of the next pass are read.

**Bad data.** A batch whose data cannot be had is still delivered, in full shape, with `error` set, so that no rank
raises alone while the others wait in a collective. The trainer asks all ranks before each step whether any has one;
where that is so, all ranks call `distributed.raise_together(batch.error)`, before anything of the step is applied. An
error that is not acted upon is raised when the next batch is asked for.

A picture that cannot be decoded is such an error too, unless `max_bad_samples` is given: its sample is then replaced by
the first of the plan's `stand_ins` that can be shown, which does not depend on the ranks, and counted: by step in
`Batch.skipped`, in all in `TrainStream.replaced`. These count one rank's samples; their sum over the ranks is the
global batch's. The log of each rank tells how many at the end of a pass, or where the stream is left within one. More
than `max_bad_samples` of them in one pass on one rank are an error again.

b samples of this rank, V views of each, H x W network input.
"""

import logging
from collections.abc import Generator, Iterator
from typing import Literal

import numpy as np
import torch

from ecn_dist import distributed
from ecn_dist.data.base_stream import NO_LABEL, Batch, Stream, Style
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.dataset import PictureDataset, Request
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.plan import PassPlan, Plan
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.transforms import ECN, Augmentation
from ecn_dist.errors import UserError

__all__ = ["NO_LABEL", "Batch", "EvaluationStream", "Style", "TrainStream"]

log = logging.getLogger("ecn_dist.data")

CPU = torch.device("cpu")


class TrainStream(Stream):
    """The planned, augmented training batches of one plan after the other.

    It starts nothing before it is iterated (or `start` is called); its workers then live until `close`, whatever is
    iterated.

        stream = TrainStream(split, plan, height=256, width=128)
        for batch in stream.batches(0, steps): ...
        stream.replan(another_plan)
        for batch in stream.batches(0, steps): ...

    Args:
        split: the training split.
        plan: which samples come when.
        height, width: network input.
        augmentation: how pictures are varied.
        style: which pictures show a sample: "real" (as it was taken), "random" (in the style of a uniformly drawn
            camera, its own included, which is the real one: METHOD.md, "Camera-invariance"), "other" (in that of a
            uniformly drawn other camera), or "all" (V = C views: the real one, then the other cameras' in their order,
            each augmented by draws of its own).
        rank, world_size: which part of each global batch.
        workers: loader processes of this stream; 0 reads in this process.
        device: where batches are delivered, and normalised.
        max_bad_samples: how many samples that cannot be decoded may be replaced in a pass, on this rank. Counted from
            the first step iterated.
        cache: where shards behind a URL are kept; unless given, `ShardCache.of_host()`.

    Attributes:
        plan: the present plan.
        replaced: samples of this rank that were replaced in the batches delivered so far.

    Raises:
        UserError: sizes that do not divide, or styles asked for and not packed.
    """

    def __init__(
        self,
        split: SplitIndex,
        plan: Plan,
        *,
        height: int,
        width: int,
        augmentation: Augmentation = ECN,
        style: Style = "real",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
        max_bad_samples: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        super().__init__(split, height, width, style, workers, device, cache)
        plan.check_ranks(world_size)
        self.plan = plan
        self.augmentation = augmentation
        self.rank, self.world_size = rank, world_size
        self.max_bad_samples = max_bad_samples
        self.replaced = 0

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the split, on every rank. `ValueError` where the plan goes by no passes."""
        if not isinstance(self.plan, PassPlan):
            raise ValueError(f"the plan of {self.plan.domain} has no passes")
        return self.plan.steps_per_pass

    def replan(self, plan: Plan) -> None:
        """Take another plan: the next `batches` follow it, made by the same workers.

        Raises:
            ValueError: it is of another seed, domain or batch size.
        """
        for name in ("seed", "domain", "global_batch_size"):
            if getattr(plan, name) != getattr(self.plan, name):
                raise ValueError(f"{name} of a stream stays {getattr(self.plan, name)!r}, not {getattr(plan, name)!r}")
        self.plan = plan

    def batches(self, first_step: int, last_step: int) -> Generator[Batch]:
        """Steps first_step .. last_step - 1 of the present plan; what comes before is not read.

        Only one iteration at a time: to begin another ends this one.

        Yields:
            the batches. One with an error is the last, and its text is then raised as `UserError`.
        """
        self.start()
        plan, of_pass, pass_number = self.plan, 0, -1
        requests = self._requests(plan, range(first_step, last_step))
        ahead = self._ahead(self._requests(plan, range(first_step, last_step)))
        try:
            for request, batch in self._load(requests, ahead, plan.labels, self.augmentation):
                if request.pass_number != pass_number:
                    self._tell(of_pass)
                    of_pass, pass_number = 0, request.pass_number
                of_pass += batch.skipped
                self.replaced += batch.skipped
                if of_pass > self.max_bad_samples:
                    batch.error = (
                        f"{of_pass} pictures in this pass cannot be decoded, more than data.max_bad_samples "
                        f"({self.max_bad_samples}): `python -m ecn_dist.validate` lists them"
                    )
                yield batch
                if batch.error:
                    raise UserError(batch.error)
        finally:
            self._tell(of_pass)  # a stream may end, or be closed, within a pass

    def _requests(self, plan: Plan, steps: range) -> Iterator[Request]:
        for step in steps:
            planned = plan.step(step, self.rank, self.world_size)
            stand_ins = [plan.stand_ins(row) for row in planned.rows_b.tolist()] if self.max_bad_samples else ()
            yield Request(step, *planned, stand_ins)

    def _samples(self) -> int:
        return self.plan.global_batch_size // self.world_size

    def _make_dataset(self, split: SplitIndex, reader: ShardReader) -> PictureDataset:
        return PictureDataset(
            split,
            self._height,
            self._width,
            reader,
            style=self._style,
            augmentation=self.augmentation,
            seed=self.plan.seed,
            domain=self.plan.domain,
        )

    def _tell(self, replaced: int) -> None:
        if replaced:
            log.warning(
                "%s: %d pictures of this pass could not be decoded and were replaced", self.plan.domain, replaced
            )


class EvaluationStream(Stream):
    """Every sample of a split exactly once over the ranks: rank r has a contiguous part of the members, in order.

    The parts are `RowPartition`'s. The last batch may be smaller, and a rank may have none.

    Args:
        split: any split.
        height, width: network input.
        batch_size: samples, of this rank.
        style: "real", or "all" for the copies in every camera's style beside it (see `TrainStream`).
        rank, world_size: which part.
        workers: loader processes, which end with each iteration; 0 reads in this process.
        device: where batches are delivered, and normalised.
        cache: as for `TrainStream`.
    """

    def __init__(
        self,
        split: SplitIndex,
        *,
        height: int,
        width: int,
        batch_size: int,
        style: Literal["real", "all"] = "real",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
        cache: ShardCache | None = None,
    ) -> None:
        super().__init__(split, height, width, style, workers, device, cache)
        part = distributed.RowPartition(len(split), world_size)
        self._rows = range(part.start(rank), part.stop(rank))
        self._batch_size = batch_size
        self._world_size = world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches. Collectives (on several ranks): at the end, one exchange of error texts.

        Raises:
            UserError: bad data; on several ranks only at the end, and on all of them.
        """
        error = None
        for batch in self._batches():
            error = batch.error
            if error:
                break
            yield batch
        if error and self._world_size == 1:
            raise UserError(error)
        if self._world_size > 1:
            distributed.raise_together(error)

    def _batches(self) -> Generator[Batch]:
        self.start()
        try:
            for _, batch in self._load(self._requests(), self._ahead(self._requests()), None, ECN):
                yield batch
        finally:
            self.close()

    def _requests(self) -> Iterator[Request]:
        for step in range(len(self)):
            rows_b = np.array(self._rows[step * self._batch_size : (step + 1) * self._batch_size])
            yield Request(step, rows_b, np.zeros_like(rows_b), 0)

    def _samples(self) -> int:
        return min(self._batch_size, len(self._rows))
