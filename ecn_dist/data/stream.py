"""Batches for training and evaluation.

A batch is addressed by its step alone: the plan says which samples, their draws how they look. So the batches are the
same for any number of ranks and workers, resuming is only another first step, and the end of a pass is nothing
special: while its last batches train, the first of the next pass are read.

**Bad data.** A batch whose data cannot be had is still delivered, in full shape, with `error` set, so that no rank
raises alone while the others wait in a collective. The trainer adds a flag to an exchange of each step that it makes
anyway (such as the one that asks whether the gradients are finite); where any rank's flag is up, all ranks call
`distributed.raise_together(batch.error)`, before anything of the step is applied. An error that is not acted upon is
raised when the next batch is asked for.

A picture that cannot be decoded is such an error too, unless `max_bad_samples` is given: it is then replaced by the
sample stored after it (by the next one, if need be; the first follows the last), which does not depend on the ranks,
and counted: by step in `Batch.skipped`, in all in `TrainStream.replaced`. These count one rank's pictures; their sum
over the ranks is the global batch's. The log of each rank tells how many at the end of a pass, or where the stream is
left within one. More than `max_bad_samples` of them in one pass on one rank are an error again.

b pictures of this rank, B of the global batch, H x W network input.
"""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.data import transforms
from ecn_dist.data.batches import NO_LABEL, Batches, EvaluationBatches, RawBatch, TrainBatches
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch_ahead import FetchAhead
from ecn_dist.data.index import SplitIndex, is_url
from ecn_dist.data.loader import check_shared_memory, load, start_fork_server
from ecn_dist.data.plan import DEFAULT_WINDOW, PassPlan, check_streams
from ecn_dist.data.reader import ShardReader
from ecn_dist.errors import UserError

__all__ = ["NO_LABEL", "Batch", "EvaluationStream", "TrainStream"]

log = logging.getLogger("ecn_dist.data")

CPU = torch.device("cpu")


@dataclass
class Batch:
    """One rank's part of a global batch. The tensors are on the stream's device."""

    images: Tensor  # (b, 3, H, W) float32, normalised
    labels: Tensor  # (b,) int64: position in the split's identities; NO_LABEL where they are not for training
    pids: Tensor  # (b,) int64, for evaluation and diagnostics
    camids: Tensor  # (b,) int64, the camera that took the picture, whatever style it appears in
    indices: Tensor  # (b,) int64, exemplar index
    error: str | None = None  # why this batch must not be used; its tensors then hold zeros
    skipped: int = 0  # how many of these b pictures stand in for one that could not be decoded; of this rank alone


class _Stream:
    def __init__(self, batches: Batches, batch_size: int, workers: int, device: torch.device) -> None:
        self._batches = batches
        self._workers = workers
        self._device = device
        if workers:
            check_shared_memory(batch_size * batches.height * batches.width * 3, workers)
            start_fork_server()

    def _load(self, steps: range) -> Iterator[Batch]:
        ahead = FetchAhead(self._batches, steps) if is_url(self._batches.split.folder) else None
        made = load(self._batches, steps, workers=self._workers, pin_memory=self._device.type != "cpu")
        try:
            for step, raw in zip(steps, made, strict=False):  # a failing loader ends early, after telling why
                if ahead:
                    ahead.reached(step)
                yield self._finish(raw)
        finally:
            made.close()
            if ahead:
                ahead.stop()

    def _finish(self, raw: RawBatch) -> Batch:
        pixels_bHW3 = raw.pixels_bHW3.to(self._device, non_blocking=True)
        images_b3HW = transforms.normalise_and_erase(pixels_bHW3, raw.boxes_b4.tolist())
        labels, pids, camids, indices = torch.from_numpy(raw.samples_4b).to(self._device)
        return Batch(images_b3HW, labels, pids, camids, indices, raw.error, raw.skipped)


def _reader(split: SplitIndex, cache: ShardCache | None) -> tuple[SplitIndex, ShardReader]:
    """The reader for a split, and the split with members that workers can map."""
    if not is_url(split.folder):
        return split, ShardReader()
    cache = cache or ShardCache.of_host()
    cache.check_room(split.shards, split.members.nbytes)
    return replace(split, members=cache.map_members(split.members)), ShardReader(cache)


class TrainStream(_Stream):
    """The planned, augmented training batches of one domain, for global steps first_step .. last_step - 1.

    Step t is step t % steps_per_pass of pass t // steps_per_pass.

    Args:
        split: the training split.
        global_batch_size, streams, seed, domain, window: the plan's, see `PassPlan`. `domain` "source" gives labels.
        height, width: network input.
        random_erasing: probability of erasing.
        camera_style: show each picture in the style of a uniformly drawn camera, its own included (METHOD.md,
            "Camera-invariance"); else as it was taken.
        first_step, last_step: the global steps to deliver. What came before first_step is not read.
        rank, world_size: which part of each global batch.
        workers: loader processes of this stream; 0 reads in this process.
        device: where batches are delivered, and normalised.
        max_bad_samples: how many pictures that cannot be decoded may be replaced in a pass, on this rank. Counted from
            first_step on in the first pass.
        cache: where shards behind a URL are kept; unless given, `ShardCache.of_host()`.

    Attributes:
        replaced: pictures of this rank that were replaced in the batches delivered so far, over all passes.

    Raises:
        UserError: sizes that do not divide or do not suffice, a source with unknown identities, styles asked for and
            not packed, too little shared memory for the workers.
    """

    def __init__(
        self,
        split: SplitIndex,
        *,
        global_batch_size: int,
        streams: int,
        seed: int,
        domain: str,
        height: int,
        width: int,
        random_erasing: float,
        camera_style: bool,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
        window: int = DEFAULT_WINDOW,
        max_bad_samples: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        check_streams(global_batch_size, streams, world_size)
        samples = [shard.samples for shard in split.shards]
        self.plan = PassPlan(samples, global_batch_size, streams, seed, domain, window)
        labelled = domain == "source"
        if labelled:
            _ = split.labels  # raises where there are none
        if camera_style and not split.has_styles:
            raise UserError(
                f"the {domain} in {split.folder} lacks {split.missing_styles} style copies, and data.camera_style is "
                "true: pack it with --camera_style histogram, or with the complete copies that ship with the data set; "
                "or train without: --data.camera_style false"
            )
        split, reader = _reader(split, cache)
        batches = TrainBatches(
            split,
            height,
            width,
            reader,
            plan=self.plan,
            rank=rank,
            world_size=world_size,
            random_erasing=random_erasing,
            camera_style=camera_style,
            labelled=labelled,
            replace_bad=max_bad_samples > 0,
        )
        super().__init__(batches, global_batch_size // world_size, workers, device)
        self.first_step, self.last_step = first_step, last_step
        self.max_bad_samples = max_bad_samples
        self.replaced = 0

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the split, on every rank."""
        return self.plan.steps_per_pass

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Generator[Batch]:
        """Yields the batches, from first_step on. A batch with an error is the last, and its text is then raised."""
        self.replaced = of_pass = 0
        try:
            for step, batch in enumerate(self._load(range(self.first_step, self.last_step)), self.first_step):
                of_pass += batch.skipped
                self.replaced += batch.skipped
                if of_pass > self.max_bad_samples:
                    batch.error = (
                        f"{of_pass} pictures in this pass cannot be decoded, more than data.max_bad_samples "
                        f"({self.max_bad_samples}): `python -m ecn_dist.validate` lists them"
                    )
                if (step + 1) % self.steps_per_pass == 0 and not batch.error:
                    self._tell(of_pass)
                    of_pass = 0
                yield batch
                if batch.error:
                    raise UserError(batch.error)
        finally:
            self._tell(of_pass)  # a stream may end, or be closed, within a pass

    def _tell(self, replaced: int) -> None:
        if replaced:
            log.warning(
                "%s: %d pictures of this pass could not be decoded and were replaced", self.plan.domain, replaced
            )


class EvaluationStream(_Stream):
    """Every picture of a split exactly once over the ranks: rank r has a contiguous part of the members, in order.

    The parts are `RowPartition`'s. The last batch may be smaller, and a rank may have none.

    Args:
        split: any split.
        height, width: network input.
        batch_size: of this rank.
        rank, world_size: which part.
        workers: loader processes; 0 reads in this process.
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
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
        cache: ShardCache | None = None,
    ) -> None:
        part = distributed.RowPartition(len(split), world_size)
        start, stop = part.start(rank), part.stop(rank)
        split, reader = _reader(split, cache)
        batches = EvaluationBatches(split, height, width, reader, start=start, stop=stop, batch_size=batch_size)
        super().__init__(batches, min(batch_size, stop - start), workers, device)
        self._world_size = world_size
        self._num_batches = -(-(stop - start) // batch_size)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches. Collectives (on several ranks): at the end, one exchange of error texts.

        Raises:
            UserError: bad data; on several ranks only at the end, and on all of them.
        """
        error = None
        for batch in self._load(range(self._num_batches)):
            error = batch.error
            if error:
                break
            yield batch
        if error and self._world_size == 1:
            raise UserError(error)
        if self._world_size > 1:
            distributed.raise_together(error)
