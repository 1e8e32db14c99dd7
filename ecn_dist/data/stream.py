"""Batches for training and evaluation.

A batch is addressed by its step alone: the plan says which samples, their draws how they look. So the batches are the
same for any number of ranks and workers, resuming is only another first step, and while the last batches of a pass
train, the first of the next are read.

**Bad data.** A batch whose data cannot be had is still delivered, in full shape, with `error` set, so that no rank
raises alone while the others wait in a collective. The trainer asks all ranks before each step whether any has one, and
then all call `distributed.raise_together(batch.error)`, before anything of the step is applied. An error that is not
acted upon is raised when the next batch is asked for.

A picture that cannot be decoded is such an error too, unless `max_bad_samples` is given: its sample is then replaced by
the first of the plan's `stand_ins` that can be shown, which does not depend on the ranks, and counted on its rank: in
`Batch.skipped`, and in the log at the end of a pass or where the stream is left within one. More than that many in a
pass on one rank are an error again.
"""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch

from ecn_dist import distributed
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.dataset import PictureDataset
from ecn_dist.data.fetch import shown
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.loader import Batch, Loader
from ecn_dist.data.plan import Plan, Step, check_batch
from ecn_dist.data.transforms import ECN, Augmentation
from ecn_dist.errors import UserError

log = logging.getLogger("ecn_dist.data")

CPU = torch.device("cpu")
Style = Literal["real", "random", "other", "all"]


@dataclass(eq=False, repr=False, kw_only=True)
class _Stream:
    """What the streams have in common. They start nothing before they are iterated."""

    split: SplitIndex = field(kw_only=False)
    height: int  # of the network input, in pixels
    width: int
    # Which pictures show a sample: "real" (as it was taken), "random" (in the style of a uniformly drawn camera; its
    # own is the real one: formulas.md, "Camera-invariance"), "other" (of a drawn other camera), or "all" (as many views
    # as cameras: the real one, then the others' in order, each with draws of its own).
    style: Style = "real"
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # loader processes of this stream; 0 reads in this process
    device: torch.device = CPU  # where batches are delivered, and normalised
    cache: ShardCache | None = None  # of shards behind a URL; unless given, `ShardCache.of_host()`

    def _make_loader(self, samples: int, *of_dataset: Any) -> None:
        """For batches of so many samples. `UserError` where styles are asked for and were not packed."""
        split, styles = self.split, get_args(Style)
        if self.style not in styles:
            raise ValueError(f"style {self.style!r} is none of {', '.join(styles)}")
        if self.style != "real" and not split.has_styles:
            raise UserError(
                f"{shown(split.folder)} lacks {split.missing_styles} style copies of its split {split.name!r}, which "
                "are to be shown: pack it with --camera_style histogram, or with the complete copies that ship with "
                "the data set; or train without: --data.camera_style false"
            )
        if self.style == "other" and split.num_cameras < 2:
            raise UserError(f"{shown(split.folder)} has one camera: no picture has a copy in the style of another")
        dataset = PictureDataset(split, self.height, self.width, self.style, self.cache, *of_dataset)
        self._loader = Loader(dataset, self.workers, self.device, samples)

    def close(self) -> None:
        """End the workers; another iteration would start others."""
        self._loader.close()


@dataclass(eq=False, repr=False, kw_only=True)
class TrainStream(_Stream):
    """The planned, augmented training batches of one plan after the other, of which rank r has its part.

    Workers live from the first iteration to `close`, over plans. Raises `UserError` for sizes that do not divide, and
    styles that were not packed.
    """

    plan: Plan = field(kw_only=False)  # which samples come when
    augmentation: Augmentation | None = ECN  # None resizes alone (bicubic), as for evaluation
    max_bad_samples: int = 0  # that may be replaced in a pass on this rank, counted from the first step iterated

    def __post_init__(self) -> None:
        plan = self.plan
        check_batch(plan.global_batch_size, plan.streams, self.world_size)
        samples = plan.global_batch_size // self.world_size
        self._make_loader(samples, self.augmentation, plan.seed, plan.domain)

    def replan(self, plan: Plan) -> None:
        """Have the next `batches` follow another plan, of the same seed, domain and batch size (else `ValueError`)."""
        for name in ("seed", "domain", "global_batch_size"):
            if getattr(plan, name) != getattr(self.plan, name):
                raise ValueError(f"{name} of a stream stays {getattr(self.plan, name)!r}, not {getattr(plan, name)!r}")
        self.plan = plan

    def batches(self, first_step: int, last_step: int) -> Generator[Batch]:
        """Steps first_step .. last_step - 1 of the present plan; what comes before is not read.

        To begin another iteration ends this one. A batch with an error is the last, and its text is then raised as
        `UserError`: also for too little shared memory for the workers, or too small a cache, before the first one.
        """
        planned = partial(self._planned, self.plan, range(first_step, last_step))
        made = self._loader.batches(planned, self.plan.labels)
        for _, of_pass in groupby(made, key=lambda step_and_batch: step_and_batch[0].pass_number):
            replaced = 0
            try:
                for _, batch in of_pass:
                    replaced += batch.skipped
                    if replaced > self.max_bad_samples:
                        batch.error = (
                            f"{replaced} pictures in this pass cannot be decoded, more than data.max_bad_samples "
                            f"({self.max_bad_samples}): `python -m ecn_dist.validate` lists them"
                        )
                    yield batch
                    if batch.error:
                        raise UserError(batch.error)
            finally:  # a stream may end, or be closed, within a pass
                if replaced:
                    text = "%s: %d pictures of this pass could not be decoded and were replaced"
                    log.warning(text, self.plan.domain, replaced)

    def _planned(self, plan: Plan, steps: range) -> Iterator[Step]:
        for number in steps:
            step = plan.step(number, self.rank, self.world_size)
            if self.max_bad_samples:
                step = step._replace(stand_ins=[plan.stand_ins(row) for row in step.rows_b.tolist()])
            yield step


@dataclass(eq=False, repr=False, kw_only=True)
class EvaluationStream(_Stream):
    """Every sample of a split exactly once over the ranks: rank r has a contiguous part of the members, in order.

    The parts are `RowPartition`'s. The last batch may be smaller, and a rank may have none.
    """

    style: Literal["real", "all"] = "real"
    batch_size: int  # samples, of this rank
    keep_workers: bool = False  # for the next iteration, until `close`; else they end with each

    def __post_init__(self) -> None:
        part = distributed.RowPartition(len(self.split), self.world_size)
        rows = np.arange(part.start(self.rank), part.stop(self.rank))
        parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        self._steps = [Step(rows_b, np.zeros_like(rows_b), 0, number) for number, rows_b in enumerate(parts)]
        self._make_loader(min(self.batch_size, len(rows)))

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; to begin another iteration ends this one. Collective: an exchange of errors at the end.

        Raises `UserError` for bad data; on several ranks only at the end, and on all of them.
        """
        error = None
        try:
            for _, batch in self._loader.batches(lambda: self._steps):
                if error := batch.error:
                    break
                yield batch
        finally:
            if not self.keep_workers:
                self.close()
        if error and self.world_size == 1:
            raise UserError(error)
        if self.world_size > 1:
            distributed.raise_together(error)
