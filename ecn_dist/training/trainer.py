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
from ecn_dist.data import Batch, EvaluationStream, ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.methods.base import SOURCE_LOSSES, Pictures, Step
from ecn_dist.models import average_local_statistics, mix_seed
from ecn_dist.ranking import EvaluationInput
from ecn_dist.ranking.evaluating import Evaluation, evaluate_backbone, has_evaluation
from ecn_dist.ranking.features import extract_split, part_stream
from ecn_dist.reporting import model_card
from ecn_dist.training.checkpoint import INTERVAL, CheckpointStore, load, read_meta
from ecn_dist.training.feeding import Feeder
from ecn_dist.training.run import fingerprints
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.strategy import Strategy
from ecn_dist.training.tracking import Interval, Tracker, describe, log

# A loss scale that starts at 2^16 and is halved at every overflow is below the smallest gradients long before.
MAX_SKIPPED_IN_A_ROW = 50


class Trainer:
    """A run in progress. It also evaluates, and extracts the features that `Method.before_epoch` asks for."""

    def __init__(
        self, config: Config, strategy: Strategy, feeder: Feeder, domains: dict[str, ShardIndex], output_dir: Path
    ) -> None:
        self.config, self.strategy, self.feeder, self.domains = config, strategy, feeder, domains
        self.method, self.timeline, self.output_dir = strategy.network, feeder.timeline, output_dir
        saving, data = config.checkpoint, config.data
        kept = {name: getattr(saving, name) for name in ("keep", "keep_best", "keep_epochs", "asynchronous")}
        self.checkpoints = CheckpointStore(output_dir / "checkpoints", **kept)
        self.step = 0  # steps that are done: with the seed, the whole position
        self.saved_step: int | None = None  # of the newest checkpoint
        self.skipped_steps = self.skipped_in_a_row = 0
        self.replaced_pictures = 0  # over all ranks, up to the newest line of metrics
        self.pictures = 0  # over all ranks, of the steps of this process
        self.device, self._dtype = self.method.setting.device, self.method.setting.dtype
        self._size = EvaluationInput(data.height, data.width, config.evaluation.batch_size, data.workers)
        self.interval = Interval(torch.zeros(len(self.method.LOSSES), dtype=self._dtype, device=self.device))
        self._target_pictures: dict[str, EvaluationStream] = {}  # by style, their loader workers kept between epochs

    def fit(self, stop: StopRequest) -> bool:
        """Train from the present position to the end; True when it is reached.

        False where any rank has a request to `stop`: the position is then saved. Collective throughout. Raises
        `UserError` on all ranks for bad data, losses that are no longer finite, and checkpoints that cannot be written.
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
                self._after_step(at, tracker)
            self._unless_allowed(self.checkpoints.finish)
            return True
        except UserError as error:
            if error.on_all_ranks:
                self._unless_allowed(self.checkpoints.finish)
            raise
        finally:
            tracker.close()
            self.feeder.close()
            for stream in self._target_pictures.values():
                stream.close()

    def train_step(self, batches: dict[str, Batch], at: Step) -> Tensor:
        """One step of training; returns this rank's losses, in the order of the method's `LOSSES`. Collective."""
        # Networks with random depth draw from torch's own generator: make that, too, a function of (seed, step).
        torch.manual_seed(mix_seed(self.config.seed, at.number))
        outputs = self.strategy.forward({name: batch.images for name, batch in batches.items()}, at)
        losses = self.method.step_losses(outputs, batches, at)
        self.strategy.backward(losses["loss"])
        took_step = self.strategy.step(self.timeline.learning_rate_factor(at, self.config.optim))
        self.skipped_steps += not took_step
        self.skipped_in_a_row = 0 if took_step else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            skipped = f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {at.number}"
            self._give_up(f"{skipped} had gradients that are not finite at any loss scale")
        self.method.finish_step(outputs, batches, took_step, at)
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
                told = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
                log.info("epoch %d: %s", at.epoch, told)
            self.method.train()
            self.interval.started = time.monotonic()
        self.feeder.begin_epoch(at)

    def _after_step(self, at: Step, tracker: Tracker) -> None:
        """What is due after a step, in this order: a line of metrics, evaluations, a checkpoint that tells of them."""
        ends_epoch, saving = self.timeline.ends_epoch(at.number), self.config.checkpoint
        saves = self.step % saving.every_steps == 0 if saving.every_steps else ends_epoch
        saves |= ends_epoch and at.epoch in saving.keep_epochs
        if self.step % self.config.logging.every_steps == 0 or ends_epoch or saves:
            loss = self._report(tracker, at)  # before a checkpoint too, which is not to be of a loss that is not finite
            if saves and not math.isfinite(loss):  # in fp16, where it may come back: what was saved stays the newest
                log.warning("no checkpoint after step %d: its loss is not finite", at.number)
                saves = False
        told: dict[str, Any] = {"step": at.number, "epoch": at.epoch}
        figures: dict[str, Any] = dict.fromkeys(("evaluation", "validation"))
        every = self.config.evaluation.every_epochs
        is_due = ends_epoch and every and (at.epoch + 1) % every == 0 and at.epoch + 1 < self.config.epochs
        if is_due and (evaluation := self.evaluate(self.domains.get("target"), f"epoch {at.epoch}")):
            figures["evaluation"] = evaluation.result.summary()
            tracker.metrics(told | {"evaluation": figures["evaluation"]})
        if saves and (validation := self.evaluate(self.domains.get("validation"), f"step {self.step}, validation")):
            of = model_card.fingerprint(self.domains["validation"])
            figures["validation"] = validation.result.summary() | {"data": of}
            shown = ("mAP", "mAP_stepwise", "rank1")
            tracker.metrics(told | {f"validation_{key}": figures["validation"][key] for key in shown})
        if ends_epoch or figures["validation"]:
            self.method.train()
            self.interval.started = time.monotonic()
        if saves:
            self._unless_allowed(lambda: self.save(figures | {"ended_epoch": at.epoch if ends_epoch else None}))

    def evaluate(self, index: ShardIndex | None, what: str) -> Evaluation | None:
        """The network on the query and gallery of `index`, logged as `what`; None where it has none. Collective."""
        if index is None or not has_evaluation(index):
            return None
        average_local_statistics(self.method)
        network, precision = self.method.evaluated, self.config.precision
        evaluation = evaluate_backbone(network, index, self._size, precision, self.device)
        log.info("%s: %s", what, describe(evaluation.result.summary()))
        return evaluation

    def extract(self, embed: Callable[[Tensor], Tensor], *, copies: bool = False) -> Pictures:
        """Features of the target's training pictures: `methods.base.Extract`. Collective."""
        split, dtype, style = self.domains["target"].split("train"), self._dtype, "all" if copies else "real"
        if style not in self._target_pictures:
            kept = part_stream(split, self._size, device=self.device, style=style, keep_workers=True)
            self._target_pictures[style] = kept
        self.method.eval()
        features = extract_split(
            lambda images: embed(images.to(dtype)),
            split,
            self._size,
            device=self.device,
            precision=self.config.precision,
            stream=self._target_pictures[style],
        ).features
        first = distributed.RowPartition(len(split), distributed.world_size()).start(distributed.rank())
        return Pictures(features, torch.from_numpy(split.indices[first : first + len(features)]).to(self.device))

    def save(self, about: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the present position; `about` goes into its meta data. Collective."""
        meta = {
            "skipped_steps": self.skipped_steps,
            "replaced_pictures": self.replaced_pictures,
            "timeline": self.timeline.in_meta(),
            "sizes": self.method.sizes(),
            "data": fingerprints(self.domains),
            "device": self.device.type,
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
        stored, here, total = meta.get("timeline"), self.timeline.in_meta(), self.timeline.total_steps
        problem = f", and this run ends at step {total}; give more epochs, or an earlier checkpoint"
        if stored != here:
            problem = (
                f" of a run with {stored}, and this one has {here}, so the step says nothing here; give the stored "
                "options or data, or start anew with --model.weights"
            )
        if stored != here or meta["step"] > total:
            raise UserError(f"resume: {checkpoint} is at step {meta['step']}{problem}", on_all_ranks=True)
        try:
            self.method.resize(meta.get("sizes", {}))
            state = self._state()
            if meta.get("config", {}).get("precision") != "fp16":
                state.pop("scaler", None)  # it has none to hand over: ours stays as it begins
            load(checkpoint, state)
            self.strategy.load_state(state)
            self.method.load_state(state)
        except UserError as error:
            named = str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}"
            raise UserError(f"resume: {named}", on_all_ranks=error.on_all_ranks) from error
        self.step = self.saved_step = meta["step"]
        self.skipped_steps = meta.get("skipped_steps", 0)
        self.replaced_pictures = meta.get("replaced_pictures", 0)
        if INTERVAL in state:
            self.interval.load_sums(state[INTERVAL], most_steps=self.step)
        log.info("continuing from %s, step %d", checkpoint, self.step)

    def _state(self) -> dict[str, Tensor]:
        return self.strategy.state() | self.method.state() | {INTERVAL: self.interval.sums()}

    def _agree(self, batches: dict[str, Batch], stop: StopRequest) -> bool:
        """Whether to stop, raise bad data, complete a written checkpoint: what one rank may know, by one all-reduce."""
        error = next((batch.error for batch in batches.values() if batch.error), None)
        bad, stops, writes = distributed.any_rank_of(error is not None, bool(stop), self.checkpoints.is_writing)
        if bad:
            distributed.raise_together(error)
        if not writes:
            self._unless_allowed(self.checkpoints.finish)
        return stops

    def _report(self, tracker: Tracker, at: Step) -> float:
        """Write one line of metrics, and begin another interval; returns its mean loss. Collective."""
        interval = self.interval
        losses = dict(zip(self.method.LOSSES, interval.mean_losses(), strict=True))
        if replaced := int(distributed.all_reduce(torch.tensor(interval.replaced))):
            log.warning("%d pictures could not be decoded and were replaced since the last line of metrics", replaced)
        self.replaced_pictures += replaced
        images_per_second = interval.steps_here * self.feeder.images(at) / (time.monotonic() - interval.started)
        factor = self.timeline.learning_rate_factor(at, self.config.optim)
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
        return losses["loss"]

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
