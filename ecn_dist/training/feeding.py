"""The batches of each step: one stream for each feed of the method."""

import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.data import Batch, SplitIndex, TrainStream
from ecn_dist.data.identity_plan import IdentityPlan
from ecn_dist.data.plan import PassPlan, Plan, check_batch
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Feed, Method, Step
from ecn_dist.models import check_statistics
from ecn_dist.training.timeline import Timeline


class Feeder:
    """Hands out the batches of the steps of a run, in order.

    Passes over a split follow each other from the method's epoch 0 on, whatever the epochs; those of the epochs on the
    source alone go on where the method asks for the same. Batches of identities are planned anew for every epoch.
    """

    def __init__(
        self, config: Config, method: Method, splits: dict[str, SplitIndex], device: torch.device, world_size: int
    ) -> None:
        """`splits` are the training ones by domain. `UserError` for sizes that do not divide, and data of no stream."""
        self._config, self._method, self._splits = config, method, splits
        self._new_stream = functools.partial(_new_stream, config, device=device, world_size=world_size)
        self.feeds = method.feeds()
        source_only = config.optim.source_only_epochs
        self.alone = (Feed("source", "source", config.global_batch_size),) if source_only else ()
        self._streams: dict[Feed, TrainStream] = {}
        for feed in dict.fromkeys((*self.alone, *self.feeds)):
            if feed.domain not in splits:
                raise UserError(
                    f"{feed.domain}: name a shard folder with a split 'train' in --config or as --{feed.domain}"
                )
            if feed.instances:
                check_batch(feed.batch_size, feed.batch_size, world_size)
            if not feed.instances or feed.domain == "source":  # else the method has yet to make the labels of its plan
                self._streams[feed] = self._new_stream(feed, splits[feed.domain], self._plan(feed, 0))
        plans = {feed: stream.plan for feed, stream in self._streams.items()}
        passes = {feed: plan.steps_per_pass for feed, plan in plans.items() if isinstance(plan, PassPlan)}
        steps = method.steps_per_epoch() or next(passes[feed] for feed in self.feeds if feed in passes)
        model = config.model
        for feed in self.feeds:  # each is a pass of its own
            check_statistics(model.batchnorm, model.batchnorm_group, pictures(feed, splits), world_size)
        self.timeline = Timeline(steps, source_only, config.epochs, passes[self.alone[0]] if self.alone else steps)
        self._opened: dict[Feed, Iterator[Batch]] = {}

    def of(self, at: Step) -> tuple[Feed, ...]:
        """The feeds of a step."""
        return self.alone if at.source_only else self.feeds

    def images(self, at: Step) -> int:
        """Pictures in a step's batches, over all ranks."""
        return sum(pictures(feed, self._splits) for feed in self.of(at))

    def begin_epoch(self, at: Step) -> None:
        """Open what step `at`, the first of its epoch or of this process, needs; `Method.before_epoch` came before."""
        total, before = self.timeline.total_steps, self.timeline.source_only_steps
        for feed in self.of(at):
            if feed.instances:
                first, plan = (at.number - before) % self.timeline.steps_per_epoch, self._plan(feed, at.epoch)
                if feed not in self._streams:
                    self._streams[feed] = self._new_stream(feed, self._splits[feed.domain], plan)
                self._streams[feed].replan(plan)
                self._opened[feed] = self._streams[feed].batches(first, self.timeline.steps_per_epoch)
            elif feed not in self._opened:
                offset = 0 if feed in self.alone else before
                last = total if feed in self.feeds else before
                self._opened[feed] = self._streams[feed].batches(at.number - offset, last - offset)

    def next(self, at: Step) -> tuple[dict[str, Batch], float]:
        """The batches of step `at` by the feeds' names, and the seconds waited for them."""
        started = time.monotonic()
        batches = {feed.name: next(self._opened[feed]) for feed in self.of(at)}
        return batches, time.monotonic() - started

    def close(self) -> None:
        """End the loader workers."""
        for stream in self._streams.values():
            stream.close()

    def _plan(self, feed: Feed, epoch: int) -> Plan:
        split = self._splits[feed.domain]
        if not feed.instances:
            return _pass_plan(self._config, feed, split)
        given = self._method.labels(feed.name)
        remedy = f"lower {feed.sized_by}, or pack more of them" if given is None else self._method.too_few_labels
        labels = split.labels if given is None else given[split.indices]
        return IdentityPlan(
            labels,
            split.indices,
            split.camids,
            identities=feed.batch_size // feed.instances,
            instances=feed.instances,
            seed=self._config.seed,
            domain=feed.name,
            epoch=epoch,
            remedy=remedy,
        )


def pictures(feed: Feed, splits: dict[str, SplitIndex]) -> int:
    """Pictures of a batch over all ranks: of each sample one, or one for each camera."""
    return feed.batch_size * (splits[feed.domain].num_cameras if feed.style == "all" else 1)


def adaptation_batches(config: Config, split: SplitIndex, device: torch.device) -> Iterator[Batch]:
    """One pass over training pictures as they are, for `adapt_batchnorm`."""
    config = replace(config, data=replace(config.data, random_erasing=0.0, max_bad_samples=0))
    feed = Feed("target", "target", config.global_batch_size)
    plan = _pass_plan(config, feed, split)
    return _new_stream(config, feed, split, plan, device, distributed.world_size()).batches(0, plan.steps_per_pass)


def _pass_plan(config: Config, feed: Feed, split: SplitIndex) -> PassPlan:
    labels = split.labels if feed.domain == "source" else None
    streams, seed = config.data.streams, config.seed
    return PassPlan(
        split.shard_samples, feed.batch_size, streams, seed, feed.name, labels=labels, sized_by=feed.sized_by
    )


def _new_stream(
    config: Config, feed: Feed, split: SplitIndex, plan: Plan, device: torch.device, world_size: int
) -> TrainStream:
    data, look = config.data, Augmentation(feed.augmentation, config.data.random_erasing)
    rank = distributed.rank() if world_size == distributed.world_size() else 0  # a dry run's are not there
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device}
    sizes: dict[str, Any] = {"height": data.height, "width": data.width, "workers": data.workers}
    bad = data.max_bad_samples
    return TrainStream(split, plan, augmentation=look, style=feed.style, max_bad_samples=bad, **ranks, **sizes)
