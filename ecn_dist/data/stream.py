"""Batches for training and evaluation.

A batch is addressed by its step alone: the plan says which samples, their draws how they look. So the batches are the
same for any number of ranks and workers, resuming is only another first step, and the end of a pass is nothing
special: while its last batches train, the first of the next pass are read.

**Bad data.** A batch whose data cannot be had is still delivered, in full shape, with `error` set, so that no rank
raises alone while the others wait in a collective. The trainer asks all ranks before each step whether any has one;
where that is so, all ranks call `distributed.raise_together(batch.error)`, before anything of the step is applied. An
error that is not acted upon is raised when the next batch is asked for.

A picture that cannot be decoded is such an error too, unless `max_bad_samples` is given: its sample is then replaced by
the first of the plan's `stand_ins` that can be shown, which does not depend on the ranks, and counted on its rank: in
`Batch.skipped`, in `TrainStream.replaced`, and in the log at the end of a pass or where the stream is left within one.
More than `max_bad_samples` of them in one pass on one rank are an error again.

b samples of this rank, V views of each, H x W network input.
"""

import logging
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from ecn_dist import distributed
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.dataset import STYLES, PictureDataset, Request
from ecn_dist.data.delivery import NO_LABEL, Batch, copy_queue, deliver
from ecn_dist.data.fetch import shown
from ecn_dist.data.fetch_ahead import FetchAhead
from ecn_dist.data.index import SplitIndex, is_url
from ecn_dist.data.loader import Loader, check_shared_memory, start_fork_server
from ecn_dist.data.plan import PassPlan, Plan, Step
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.transforms import ECN, Augmentation
from ecn_dist.errors import UserError

__all__ = ["NO_LABEL", "Batch", "EvaluationStream", "Style", "TrainStream"]

log = logging.getLogger("ecn_dist.data")

CPU = torch.device("cpu")
Style = Literal["real", "random", "other", "all"]


class TrainStream:
    """The planned, augmented training batches of one plan after the other.

    It starts nothing before it is iterated (or `start` is called); its workers then live until `close`, over plans.

    Args:
        split: the training split.
        plan: which samples come when.
        height, width: network input.
        augmentation: how pictures are varied; None resizes alone (bicubic), as for evaluation.
        style: which pictures show a sample: "real" (as it was taken), "random" (in the style of a uniformly drawn
            camera; its own is the real one: formulas.md, "Camera-invariance"), "other" (of a drawn other camera), or
            "all" (V = C views: the real one, then the other cameras' in order, each with draws of its own).
        rank, world_size: which part of each global batch.
        workers: loader processes of this stream; 0 reads in this process.
        device: where batches are delivered, and normalised.
        max_bad_samples: that may be replaced in a pass on this rank, counted from the first step iterated.
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
        augmentation: Augmentation | None = ECN,
        style: Style = "real",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
        max_bad_samples: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        _check_style(split, style)
        plan.check_ranks(world_size)
        self.plan = plan
        self.rank, self.world_size = rank, world_size
        self.max_bad_samples = max_bad_samples
        self.replaced = 0
        self._split, self._style, self._augmentation = split, style, augmentation
        self._size = height, width
        self._workers, self._device, self._cache = workers, device, cache
        self._dataset: PictureDataset | None = None
        self._loader: Loader | None = None

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the split, on every rank. `ValueError` where the plan goes by no passes."""
        if not isinstance(self.plan, PassPlan):
            raise ValueError(f"the plan of {self.plan.domain} has no passes")
        return self.plan.steps_per_pass

    def start(self) -> None:
        """What the first iteration would do: see to the cache of a URL's shards, shared memory and the workers' server.

        Raises:
            UserError: too little shared memory for the workers, or too small a cache.
        """
        if self._dataset is not None:
            return
        split, reader = _reader(self._split, self._cache)
        how, plan = self._augmentation, self.plan
        dataset = PictureDataset(
            split, *self._size, reader, style=self._style, augmentation=how, seed=plan.seed, domain=plan.domain
        )
        if self._workers:
            check_shared_memory(dataset.batch_bytes(plan.global_batch_size // self.world_size), self._workers)
            start_fork_server()
        self._dataset = dataset
        self._loader = Loader(dataset, self._workers, pin_memory=copy_queue(self._device) is not None)

    def close(self) -> None:
        """End the workers. Another iteration would start others."""
        if self._loader is not None:
            self._loader.close()

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

        To begin another iteration ends this one. A batch with an error is the last, and its text is then raised as
        `UserError`.
        """
        self.start()
        of_pass, pass_number = 0, -1
        try:
            for request, batch in self._delivered(self.plan, range(first_step, last_step)):
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

    def _tell(self, replaced: int) -> None:
        if replaced:
            text = "%s: %d pictures of this pass could not be decoded and were replaced"
            log.warning(text, self.plan.domain, replaced)

    def _requests(self, plan: Plan, steps: range) -> Iterator[Request]:
        for step in steps:
            planned = plan.step(step, self.rank, self.world_size)
            stand_ins = [plan.stand_ins(row) for row in planned.rows_b.tolist()] if self.max_bad_samples else ()
            yield Request(step, *planned, stand_ins)

    def _delivered(self, plan: Plan, steps: range) -> Generator[tuple[Request, Batch]]:
        assert self._loader is not None
        assert self._dataset is not None
        cache = self._dataset.reader.cache
        ahead = FetchAhead(self._dataset.split, cache, self._requests(plan, steps)) if cache else None
        made = self._loader.load(self._requests(plan, steps))
        how = self._augmentation or ECN
        try:
            for request, batch in deliver(made, plan.labels, self._size, how, self._device):
                if ahead:
                    ahead.reached(request.step)
                yield request, batch
        finally:
            if ahead:
                ahead.stop()


def _check_style(split: SplitIndex, style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
    if style != "real" and not split.has_styles:
        raise UserError(
            f"{shown(split.folder)} lacks {split.missing_styles} style copies of its split {split.name!r}, and "
            "pictures are to be shown in other cameras' styles (data.camera_style): pack it with --camera_style "
            "histogram, or with the complete copies that ship with the data set; or train without: "
            "--data.camera_style false"
        )
    if style == "other" and split.num_cameras < 2:
        raise UserError(f"{shown(split.folder)} has one camera: no picture has a copy in the style of another")


def _reader(split: SplitIndex, cache: ShardCache | None) -> tuple[SplitIndex, ShardReader]:
    """The split, with members that workers can map, and its reader."""
    if not is_url(split.folder):
        return split, ShardReader()
    cache = cache or ShardCache.of_host()
    cache.check_room(split.shards, split.members.nbytes)
    return replace(split, members=cache.map_members(split.members)), ShardReader(cache)


class _InOrder:
    """The plan of an evaluation: the samples of one rank, one after the other."""

    seed, domain, labels = 0, "", None

    def __init__(self, rows: range, batch_size: int) -> None:
        self._rows, self._batch_size = rows, batch_size
        self.global_batch_size = min(batch_size, len(rows))

    def check_ranks(self, world_size: int) -> None:
        """Any number will do."""

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Step:
        rows_b = np.array(self._rows[step * self._batch_size : (step + 1) * self._batch_size])
        return Step(rows_b, np.zeros_like(rows_b), 0)

    def stand_ins(self, row: int) -> np.ndarray:
        raise NotImplementedError("an evaluation does without no picture")


class EvaluationStream:
    """Every sample of a split exactly once over the ranks: rank r has a contiguous part of the members, in order.

    The parts are `RowPartition`'s. The last batch may be smaller, and a rank may have none.

    Args:
        split: any split.
        batch_size: samples, of this rank.
        style: "real", or "all" for the copies in every camera's style beside it (see `TrainStream`).
        rank, world_size: which part.
        height, width, workers, device, cache: as for `TrainStream`; the workers end with each iteration.
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
        part = distributed.RowPartition(len(split), world_size)
        rows = range(part.start(rank), part.stop(rank))
        self._stream = TrainStream(
            split,
            _InOrder(rows, batch_size),
            height=height,
            width=width,
            augmentation=None,
            style=style,
            workers=workers,
            device=device,
            cache=cache,
        )
        self._steps = -(-len(rows) // batch_size)
        self._world_size = world_size

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches. Collectives (on several ranks): at the end, one exchange of error texts.

        Raises:
            UserError: bad data; on several ranks only at the end, and on all of them.
        """
        error = None
        try:
            for batch in self._stream.batches(0, len(self)):
                if error := batch.error:
                    break
                yield batch
        finally:
            self._stream.close()
        if error and self._world_size == 1:
            raise UserError(error)
        if self._world_size > 1:
            distributed.raise_together(error)
