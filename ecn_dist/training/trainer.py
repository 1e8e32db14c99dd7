"""Everything that changes while a run trains, and the loop over its steps. The trainer knows no method."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.config import Config, flatten
from ecn_dist.data import Batch
from ecn_dist.errors import UserError
from ecn_dist.methods.base import SOURCE_LOSSES, Extract, Step
from ecn_dist.models import average_local_statistics, mix_seed
from ecn_dist.training.checkpoint import OF_RANKS, CheckpointStore, Keep, load, read_meta
from ecn_dist.training.feeding import Feeder
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.strategy import Strategy
from ecn_dist.training.timeline import learning_rate_factor
from ecn_dist.training.tracking import Interval, Tracker, log

# A loss scale that starts at 2^16 and is halved at every overflow is below the smallest gradients long before.
MAX_SKIPPED_IN_A_ROW = 50

AfterEpoch = Callable[[int], dict[str, Any] | None]


class Trainer:
    """A run in progress."""

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        feeder: Feeder,
        output_dir: Path,
        extract: Extract,
        data: dict[str, str],
    ) -> None:
        """`extract` serves `Method.before_epoch`; `data` are the fingerprints of the run's domains, for checkpoints."""
        self.config, self.strategy, self.feeder, self.extract, self.data = config, strategy, feeder, extract, data
        self.method, self.timeline, self.output_dir = strategy.network, feeder.timeline, output_dir
        saving = config.checkpoint
        keep = Keep(saving.keep, saving.keep_best, tuple(saving.keep_epochs))
        self.checkpoints = CheckpointStore(output_dir / "checkpoints", keep, asynchronous=saving.asynchronous)
        self.step = 0  # steps that are done: with the seed, the whole position
        self.saved_step: int | None = None  # of the newest checkpoint
        self.skipped_steps = self.skipped_in_a_row = 0
        self.diverging = False
        self.replaced_pictures = 0  # over all ranks, up to the newest line of metrics
        self.pictures = 0  # over all ranks, of the steps of this process
        setting = self.method.setting
        losses = torch.zeros(len(self.method.LOSSES), dtype=setting.dtype, device=setting.device)
        self.interval = Interval(losses)

    def fit(self, after_epoch: AfterEpoch, stop: StopRequest) -> bool:
        """Train from the present position to the end; True when it is reached.

        `after_epoch(epoch)` is called on all ranks alike, and returns figures if it evaluated. False where any rank has
        a request to `stop`: the position is then saved. Collective throughout. Raises `UserError` on all ranks for bad
        data, losses that are no longer finite, and checkpoints that cannot be written.
        """
        continues = not self.timeline.begins_epoch(self.step)
        total, tensorboard = self.timeline.total_steps, self.config.logging.tensorboard
        tracker = distributed.together(
            lambda: Tracker(self.output_dir, first_step=self.step, total_steps=total, tensorboard=tensorboard)
        )
        self.method.train()
        try:
            while self.step < total:
                at = self.timeline.at(self.step)
                distributed.at_step(at.number)
                if self.timeline.begins_epoch(at.number) or continues:
                    self._begin_epoch(at, tracker, continues)
                    continues = False
                batches, waited = self.feeder.next(at)
                if self._agree(batches, stop):
                    stop.signal = stop.signal or "another rank's signal"
                    if self.saved_step != self.step:
                        if self.interval.steps:
                            self._check_finite(self.step, self.interval.mean_losses())
                        self.save()
                    self.checkpoints.finish()
                    return False
                losses = self.train_step(batches, at)
                self.interval.add(losses, waited, sum(batch.skipped for batch in batches.values()))
                self.step += 1
                self.pictures += self.feeder.images(at)
                self._after_step(at, tracker, after_epoch)
            self._unless_allowed(self.checkpoints.finish)
            return True
        except UserError as error:
            if error.on_all_ranks:
                self._unless_allowed(self.checkpoints.finish)
            raise
        finally:
            tracker.close()
            self.feeder.close()

    def train_step(self, batches: dict[str, Batch], at: Step) -> Tensor:
        """One step of training; returns this rank's losses, in the order of the method's `LOSSES`. Collective."""
        # Networks with random depth draw from torch's own generator: make that, too, a function of (seed, step).
        torch.manual_seed(mix_seed(self.config.seed, at.number))
        outputs = self.strategy.forward({name: batch.images for name, batch in batches.items()}, at)
        losses = self.method.step_losses(outputs, batches, at)
        self.strategy.backward(losses["loss"])
        took_step = self._optimizer_step(at)
        if not at.source_only:
            self.method.after_step(outputs, batches, took_step, at)
        zero = torch.zeros_like(losses["loss"])
        return torch.stack([losses.get(name, zero) for name in self.method.LOSSES]).detach()

    def _begin_epoch(self, at: Step, tracker: Tracker, continues: bool) -> None:
        """What precedes the step `at`, the first of its epoch or of this process."""
        if not continues:  # features of the target, and a wrapper that is made anew, are to be of one network
            average_local_statistics(self.method)
        self.strategy.begin_phase(at.source_only)
        if not at.source_only and not continues:
            if figures := self.method.before_epoch(at.epoch, self.extract):
                tracker.metrics({"step": at.number, "epoch": at.epoch} | figures)
            self.method.train()
            self.interval.started = time.monotonic()
        self.feeder.begin_epoch(at)

    def _after_step(self, at: Step, tracker: Tracker, after_epoch: AfterEpoch) -> None:
        """What is due after a step, in this order: a line of metrics, an evaluation, a checkpoint that tells of it."""
        ends_epoch = self.timeline.ends_epoch(at.number)
        every = self.config.checkpoint.every_steps
        saves = self.step % every == 0 if every else ends_epoch
        if self.step % self.config.logging.every_steps == 0 or ends_epoch or saves:
            # Before a checkpoint too: it must not be written once the loss is no longer finite.
            self._report(tracker, at)
        evaluation = None
        if ends_epoch:
            evaluation = after_epoch(at.epoch)
            if evaluation is not None:
                tracker.metrics({"step": at.number, "epoch": at.epoch, "evaluation": evaluation})
            self.method.train()
            self.interval.started = time.monotonic()
            keep = self.checkpoints.keep
            saves |= (keep.best and evaluation is not None) or at.epoch in keep.epochs
        if saves and self.diverging:  # in fp16, where it may come back; what was saved before stays the newest
            log.warning("no checkpoint after step %d: its loss is not finite", at.number)
        elif saves:
            about = {"ended_epoch": at.epoch if ends_epoch else None, "evaluation": evaluation}
            self._unless_allowed(lambda: self.save(about))

    def _optimizer_step(self, at: Step) -> bool:
        took_step = self.strategy.step(self._learning_rate_factor(at))
        self.skipped_steps += not took_step
        self.skipped_in_a_row = 0 if took_step else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            self._give_up(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {at.number} had gradients that are not finite at "
                "any loss scale"
            )
        return took_step

    def save(self, about: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the present position; `about` goes into its meta data. Collective."""
        meta = {
            "skipped_steps": self.skipped_steps,
            "replaced_pictures": self.replaced_pictures,
            "timeline": self.timeline.in_meta(),
            "sizes": self.method.sizes(),
            "data": self.data,
            "device": self.interval.losses.device.type,
            "config": flatten(self.config),
        }
        self.checkpoints.save(self.step, self._state(), meta | (about or {}))
        self.saved_step = self.step

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
        meta = distributed.together(lambda: read_meta(checkpoint))
        if meta["timeline"] != self.timeline.in_meta():
            raise UserError(
                f"resume: {checkpoint} is at step {meta['step']} of a run with {meta['timeline']}, and this one has "
                f"{self.timeline.in_meta()}, so the step says nothing here; give the stored options or data, or start "
                "anew with --model.weights",
                on_all_ranks=True,
            )
        self.method.resize(meta.get("sizes", {}))
        state = self._state()
        # A run that was not in fp16 has no loss scale to hand over: ours stays as it begins.
        scaler = state.pop("scaler", None) if meta.get("config", {}).get("precision") != "fp16" else None
        load(checkpoint, state)
        if scaler is not None:
            state["scaler"] = scaler
        self.step = self.saved_step = meta["step"]
        self.skipped_steps = meta["skipped_steps"]
        self.replaced_pictures = meta.get("replaced_pictures", 0)
        self.strategy.load_state(state)
        self.method.load_state(state)
        if f"{OF_RANKS}interval" in state:
            *losses, steps = distributed.own_part(state[f"{OF_RANKS}interval"])[0]
            self.interval.losses, self.interval.steps = torch.stack(losses), int(steps)
        log.info("continuing from %s, step %d", checkpoint, self.step)

    def _state(self) -> dict[str, Tensor]:
        interval = torch.cat([self.interval.losses, self.interval.losses.new_tensor([self.interval.steps])])
        of_ranks = {f"{OF_RANKS}interval": distributed.as_row_sharded(interval[None], distributed.world_size())}
        return self.strategy.state() | self.method.state() | of_ranks

    def _agree(self, batches: dict[str, Batch], stop: StopRequest) -> bool:
        """Whether to stop, raise bad data, complete a written checkpoint: what one rank may know, by one all-reduce."""
        error = next((batch.error for batch in batches.values() if batch.error), None)
        bad, stops, writes = distributed.any_rank_of(error is not None, bool(stop), self.checkpoints.is_writing)
        if bad:
            distributed.raise_together(error)
        if not writes:
            self._unless_allowed(self.checkpoints.finish)
        return stops

    def _learning_rate_factor(self, at: Step) -> float:
        optim = self.config.optim
        position, epochs = self.timeline.position_in_phase(at)
        # The step schedule counts epochs that have begun, and belongs to the method's own epochs.
        listed = optim.step_epoch if isinstance(optim.step_epoch, list) else [optim.step_epoch]
        steps, warmup = () if at.source_only else listed, optim.warmup_epochs
        return learning_rate_factor(
            position, schedule=optim.schedule, epochs=epochs, step_epochs=steps, warmup_epochs=warmup
        )

    def _report(self, tracker: Tracker, at: Step) -> None:
        """Write one line of metrics, and begin another interval. Collective."""
        interval = self.interval
        losses = dict(zip(self.method.LOSSES, interval.mean_losses(), strict=True))
        if replaced := int(distributed.all_reduce(torch.tensor(interval.replaced))):
            log.warning("%d pictures could not be decoded and were replaced since the last line of metrics", replaced)
        self.replaced_pictures += replaced
        self.diverging = not math.isfinite(losses["loss"])
        images_per_second = interval.steps_here * self.feeder.images(at) / (time.monotonic() - interval.started)
        factor = self._learning_rate_factor(at)
        record: dict[str, Any] = {
            "step": at.number,
            "epoch": at.epoch,
            **{name: None if at.source_only and name not in SOURCE_LOSSES else losses[name] for name in losses},
            "lr": self.config.optim.lr * factor,
            "lr_backbone": self.config.optim.backbone_lr * factor,
            "images_per_second": images_per_second,
            "data_wait": interval.data_wait / max(interval.steps_here, 1),
            "skipped_steps": self.skipped_steps,
            "replaced_pictures": self.replaced_pictures,
        }
        if not at.source_only:
            record |= self.method.health()
        tracker.metrics(record)
        name = f"epoch {at.epoch}"
        if at.source_only:
            name = f"source-only epoch {at.epoch + self.timeline.source_only_epochs}"
        figures = f"loss {losses['loss']:.4f}  {images_per_second:.0f} images/s"
        tracker.progress(at.number, name, figures, epoch_ended=self.timeline.ends_epoch(at.number))
        self._check_finite(at.number, list(losses.values()))
        self.interval = Interval(torch.zeros_like(interval.losses))

    def _check_finite(self, step: int, losses: list[float]) -> None:
        """Raise `UserError`, on all ranks, for a loss that training will not come back from."""
        if not math.isfinite(losses[0]) and self.config.precision != "fp16":
            named = list(zip(self.method.LOSSES, losses, strict=True))[1:]
            parts = ", ".join(f"{name.removeprefix('loss_')} {value}" for name, value in named)
            self._give_up(f"the loss is {losses[0]} around step {step} ({parts})")

    def _give_up(self, problem: str) -> NoReturn:
        saved = f"the newest checkpoint in {self.checkpoints.folder} is from before. " if self.saved_step else ""
        remedy = f"{saved}Lower optim.lr or optim.backbone_lr, or add optim.warmup_epochs"
        raise UserError(f"{problem}; {remedy}", on_all_ranks=True)
