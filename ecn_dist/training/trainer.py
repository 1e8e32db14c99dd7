"""The training of ECN: two passes, two losses, one step, one memory update.

Shape letters: b images of a domain here, D embedding dimension, P source identities.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.config import Config, flatten
from ecn_dist.data import Batch
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.training.checkpoint import OF_RANKS, CheckpointStore, Keep, load
from ecn_dist.training.interval import Interval
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.strategy import Strategy
from ecn_dist.training.timeline import Timeline, learning_rate_factor, memory_momentum, neighbors_in_epoch
from ecn_dist.training.tracking import Tracker, log

# A loss scale that starts at 2^16 and is halved at every overflow is below the smallest gradients long before.
MAX_SKIPPED_IN_A_ROW = 50


class Trainer:
    """Everything that changes while a run trains, and the loop over its steps."""

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        memory: ExemplarMemory,
        timeline: Timeline,
        streams: Callable[[int], tuple[Iterator[Batch], Iterator[Batch]]],
        output_dir: Path,
        data: dict[str, str] | None = None,
    ) -> None:
        """`streams(first_step)` gives the source and target batches from the global step `first_step` on.

        `data` are the fingerprints of source and target, for checkpoints to tell.
        """
        self.config = config
        self.strategy = strategy
        self.memory = memory
        self.timeline = timeline
        self.streams = streams
        self.output_dir = output_dir
        self.data = data
        keep = config.checkpoint
        self.keep = Keep(keep.keep, keep.keep_best, tuple(keep.keep_epochs))
        self.checkpoints = CheckpointStore(output_dir / "checkpoints", self.keep, asynchronous=keep.asynchronous)
        self.step = 0  # steps that are done: with the seed, the whole position
        self.saved_step: int | None = None  # of the newest checkpoint
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.diverging = False
        self.replaced_pictures = 0  # over all ranks, up to the newest line of metrics
        self.interval = self._new_interval()

    def fit(
        self, after_epoch: Callable[[int], dict[str, Any] | None] | None = None, stop: StopRequest | None = None
    ) -> bool:
        """Train from the present position to the end; True when it is reached.

        `after_epoch(epoch)` is called on all ranks alike, and returns figures if it evaluated. False where any rank has
        a request to `stop`: the position is then saved. Collective throughout. Raises `UserError` on all ranks for bad
        data, losses that are no longer finite, and checkpoints that cannot be written.
        """
        stop = StopRequest() if stop is None else stop
        source, target = self.streams(self.step)
        tracker = Tracker(
            self.output_dir,
            first_step=self.step,
            total_steps=self.timeline.total_steps,
            tensorboard=self.config.logging.tensorboard,
        )
        self.strategy.network.train()
        try:
            while self.step < self.timeline.total_steps:
                step = self.step
                distributed.at_step(step)
                source_batch, target_batch, waited = self._next(source, target, step)
                if self._agree(source_batch, target_batch, stop):
                    self._save_and_stop()
                    return False
                losses_3 = self.train_step(source_batch, target_batch, step)
                replaced = source_batch.skipped + (target_batch.skipped if target_batch else 0)
                self.interval.add(losses_3, waited, replaced)
                self.step += 1
                self._after_step(step, tracker, after_epoch)
            self._unless_allowed(self.checkpoints.finish)
            return True
        except UserError as error:
            if error.on_all_ranks:
                self._unless_allowed(self.checkpoints.finish)
            raise
        finally:
            tracker.close()

    def _after_step(
        self, step: int, tracker: Tracker, after_epoch: Callable[[int], dict[str, Any] | None] | None
    ) -> None:
        """What is due after `step`, in this order: a line of metrics, an evaluation, a checkpoint that tells of it."""
        epoch, ends_epoch = self.timeline.epoch(step), self.timeline.ends_epoch(step)
        every = self.config.checkpoint.every_steps
        saves = self.step % every == 0 if every else ends_epoch
        if self.step % self.config.logging.every_steps == 0 or ends_epoch or saves:
            # Before a checkpoint too: it must not be written once the loss is no longer finite.
            self._report(tracker, step)
        evaluation = None
        if ends_epoch and after_epoch is not None:
            evaluation = after_epoch(epoch)
            if evaluation is not None:
                self._write_metrics(tracker, {"step": step, "epoch": epoch, "evaluation": evaluation})
            self.strategy.network.train()
            self.interval.started = time.monotonic()
            saves |= (self.keep.best and evaluation is not None) or epoch in self.keep.epochs
        if saves and self.diverging:  # in fp16, where it may come back; what was saved before stays the newest
            log.warning("no checkpoint after step %d: its loss is not finite", step)
        elif saves:
            about = {"ended_epoch": epoch if ends_epoch else None, "evaluation": evaluation}
            self._unless_allowed(lambda: self.save(about))

    def train_step(self, source: Batch, target: Batch | None, step: int) -> Tensor:
        """One step of training; returns the (3,) losses of this rank: total, source, target.

        `target` is None in epochs of source-only training.
        """
        # Networks with random depth draw from torch's own generator: make that, too, a function of (seed, step).
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        if target is None or self.config.loss.target_weight == 0:
            return self._step_without_target_loss(source, target, step)
        return self._step_of_ecn(source, target, step)

    def _step_of_ecn(self, source: Batch, target: Batch, step: int) -> Tensor:
        """METHOD.md: Losses, Memory update."""
        epoch, loss = self.timeline.epoch(step), self.config.loss

        logits_bP, features_bD = self.strategy.forward(source.images, target.images, step)
        assert features_bD is not None
        gathered = self.memory.gather(features_bD, target.indices)  # on its way during the source loss
        loss_source = F.cross_entropy(logits_bP, source.labels)
        num_neighbors = neighbors_in_epoch(loss.num_neighbors, loss.neighbors_from_epoch, epoch)
        loss_target = self.memory.loss(features_bD, target.indices, num_neighbors, gathered=gathered)
        total = (1 - loss.target_weight) * loss_source + loss.target_weight * loss_target

        self.strategy.backward(total)
        took_step = self._optimizer_step(step)
        momentum = memory_momentum(self.config.memory.momentum, epoch)
        self.memory.update(features_bD, target.indices, momentum, skip=not took_step, gathered=gathered)
        return torch.stack([total, loss_source, loss_target]).detach()

    def _step_without_target_loss(self, source: Batch, target: Batch | None, step: int) -> Tensor:
        """Source-only training, and the control lambda = 0, in which the target passes and only BatchNorm sees it."""
        logits_bP, _ = self.strategy.forward(source.images, None if target is None else target.images, step)
        loss_source = F.cross_entropy(logits_bP, source.labels)
        self.strategy.backward(loss_source)
        self._optimizer_step(step)
        return torch.stack([loss_source, loss_source, torch.zeros_like(loss_source)]).detach()

    def _optimizer_step(self, step: int) -> bool:
        took_step = self.strategy.step(self._learning_rate_factor(step))
        self.skipped_steps += not took_step
        self.skipped_in_a_row = 0 if took_step else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {step} had gradients that are not finite at any "
                f"loss scale; {self._remedy()}",
                on_all_ranks=True,
            )
        return took_step

    def images_since(self, first_step: int) -> int:
        """Pictures of both domains, over all ranks, in the steps from `first_step` to the present one."""
        done = range(first_step, self.step)
        source_only = len(range(first_step, min(self.step, self.timeline.source_only_steps)))
        return (2 * len(done) - source_only) * self.config.global_batch_size

    def save(self, about: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the present position; `about` goes into its meta data. Collective."""
        meta = {
            "skipped_steps": self.skipped_steps,
            "replaced_pictures": self.replaced_pictures,
            "timeline": self._timeline_in_meta(),
            "data": self.data,
            "config": flatten(self.config),
        }
        self.checkpoints.save(self.step, self._state(), meta | (about or {}))
        self.saved_step = self.step

    def _save_and_stop(self) -> None:
        if self.saved_step != self.step:
            if self.interval.steps:
                self._check_finite(self.step, *self.interval.mean_losses())
            self.save()
        self.checkpoints.finish()

    def _unless_allowed(self, action: Callable[[], None]) -> None:
        """`action`, which saves: its failure ends the run, unless the configuration says that it need not."""
        try:
            action()
        except UserError as error:
            if self.config.checkpoint.on_failure == "stop" or not error.on_all_ranks:
                raise
            log.error("%s", error)

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`, written on any number of ranks. Collective."""
        state = self._state()
        meta = load(checkpoint, state)
        if meta["timeline"] != self._timeline_in_meta():
            raise UserError(
                f"resume: {checkpoint} is at step {meta['step']} of a run with {meta['timeline']}, and this one has "
                f"{self._timeline_in_meta()}, so the step says nothing here; give the stored options or data, or start "
                "anew with --model.weights",
                on_all_ranks=True,
            )
        self.step = self.saved_step = meta["step"]
        self.skipped_steps = meta["skipped_steps"]
        self.replaced_pictures = meta.get("replaced_pictures", 0)
        self.strategy.load_state(state)
        self.memory.load_local_state({key: _local(state[f"memory.{key}"]) for key in self.memory.local_state()})
        self.memory.load_global_state({key: state[f"memory.{key}"] for key in self.memory.global_state()})
        if f"{OF_RANKS}interval" in state:
            *losses_3, steps = _local(state[f"{OF_RANKS}interval"])[0]
            self.interval.losses, self.interval.steps = torch.stack(losses_3), int(steps)
        log.info("continuing from %s, step %d", checkpoint, self.step)

    def _timeline_in_meta(self) -> dict[str, int]:
        timeline = self.timeline
        return {"steps_per_epoch": timeline.steps_per_epoch, "source_only_epochs": timeline.source_only_epochs}

    def _state(self) -> dict[str, Tensor]:
        memory = {
            key: distributed.as_row_sharded(rows, self.memory.num_exemplars)
            for key, rows in self.memory.local_state().items()
        }
        memory |= self.memory.global_state()
        interval = torch.cat([self.interval.losses, self.interval.losses.new_tensor([self.interval.steps])])
        of_ranks = {f"{OF_RANKS}interval": distributed.as_row_sharded(interval[None], distributed.world_size())}
        return self.strategy.state() | {f"memory.{key}": tensor for key, tensor in memory.items()} | of_ranks

    def _next(self, source: Iterator[Batch], target: Iterator[Batch], step: int) -> tuple[Batch, Batch | None, float]:
        """The batches of `step` and the seconds waited for them."""
        started = time.monotonic()
        source_batch = next(source)
        target_batch = None if self.timeline.is_source_only(step) else next(target)
        return source_batch, target_batch, time.monotonic() - started

    def _agree(self, source: Batch, target: Batch | None, stop: StopRequest) -> bool:
        """Whether to stop before this step. All ranks act alike on what one may know alone, by one small all-reduce.

        Bad data is raised; a checkpoint of which every rank's part is written is completed.
        """
        error = source.error or (target.error if target else None)
        bad, stops, writes = distributed.any_rank_of(error is not None, bool(stop), self.checkpoints.is_writing)
        if bad:
            distributed.raise_together(error)
        if not writes:
            self._unless_allowed(self.checkpoints.finish)
        return stops

    def _learning_rate_factor(self, step: int) -> float:
        optim = self.config.optim
        done, epochs = self.timeline.position_in_phase(step)
        return learning_rate_factor(
            done,
            schedule=optim.schedule,
            epochs=epochs,
            # The step schedule counts epochs that have begun, and belongs to the training with both losses.
            step_epoch=optim.step_epoch if not self.timeline.is_source_only(step) else epochs + 1,
            warmup_epochs=optim.warmup_epochs,
        )

    def _new_interval(self) -> Interval:
        dtype = torch.float64 if self.config.precision == "fp64" else torch.float32
        return Interval(torch.zeros(3, dtype=dtype, device=self.memory.rows.device))

    def _report(self, tracker: Tracker, step: int) -> None:
        """Write one line of metrics, and begin another interval. Collective."""
        interval = self.interval
        loss, loss_source, loss_target = interval.mean_losses()
        replaced = interval.replaced_on_all_ranks()
        if replaced:
            log.warning("%d pictures could not be decoded and were replaced since the last line of metrics", replaced)
        self.replaced_pictures += replaced
        self.diverging = not math.isfinite(loss)
        epoch = self.timeline.epoch(step)
        domains = 1 if self.timeline.is_source_only(step) else 2
        seconds = time.monotonic() - interval.started
        images_per_second = interval.steps_here * domains * self.config.global_batch_size / seconds
        factor = self._learning_rate_factor(step)
        record: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "loss_source": loss_source,
            "loss_target": loss_target if domains == 2 else None,
            "lr": self.config.optim.lr * factor,
            "lr_backbone": self.config.optim.backbone_lr * factor,
            "images_per_second": images_per_second,
            "data_wait": interval.data_wait / max(interval.steps_here, 1),
            "skipped_steps": self.skipped_steps,
            "replaced_pictures": self.replaced_pictures,
        }
        if domains == 2 and self.config.loss.target_weight > 0:
            record |= {f"memory_{name}": value for name, value in self.memory.health().items()}
        self._write_metrics(tracker, record)
        name = f"epoch {epoch}" if domains == 2 else f"source-only epoch {epoch + self.timeline.source_only_epochs}"
        figures = f"loss {loss:.4f}  {images_per_second:.0f} images/s"
        tracker.progress(step, name, figures, epoch_ended=self.timeline.ends_epoch(step))
        self._check_finite(step, loss, loss_source, loss_target)
        self.interval = self._new_interval()

    def _check_finite(self, step: int, loss: float, loss_source: float, loss_target: float) -> None:
        """Raise `UserError`, on all ranks, for a loss that training will not come back from."""
        if not math.isfinite(loss) and self.config.precision != "fp16":
            raise UserError(
                f"the loss is {loss} around step {step} (source {loss_source}, target {loss_target}); {self._remedy()}",
                on_all_ranks=True,
            )

    def _remedy(self) -> str:
        return (
            f"the newest checkpoint in {self.checkpoints.folder} is from before. Lower optim.lr or optim.backbone_lr, "
            "or add optim.warmup_epochs"
        )

    @staticmethod
    def _write_metrics(tracker: Tracker, record: dict[str, Any]) -> None:
        """On rank 0; a disk that is full ends all ranks with that text."""
        distributed.together(lambda: tracker.metrics(record))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
