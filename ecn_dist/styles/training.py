"""Training the generator on the planned stream: one step is the same on any number of ranks.

b pictures here, B on all ranks, H x W pixels.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecn_dist import distributed
from ecn_dist.data import PassPlan, ShardIndex, TrainStream
from ecn_dist.data.draws import Draws
from ecn_dist.errors import UserError
from ecn_dist.models import autocast
from ecn_dist.styles.losses import critic_losses, generator_losses
from ecn_dist.styles.networks import Discriminator, Generator, Shape, is_finite, to_unit
from ecn_dist.styles.options import Config, flatten
from ecn_dist.training.checkpoint import INTERVAL, CheckpointStore, load, read_meta
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.tracking import Interval, Tracker, log

CRITIC = ("critic", "penalty", "camera_real")
GENERATOR = ("generator", "camera", "cycle")
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


class StyleTrainer:
    """Generator and discriminator in training."""

    def __init__(self, config: Config, index: ShardIndex, device: torch.device, data: dict[str, str]) -> None:
        """`config` has its sizes; `data` are the fingerprints for checkpoints. `UserError` for data that do not do."""
        self.config, self.device, self.data = config, device, data
        self.split = index.split("train")
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        torch.manual_seed(config.seed)
        height, width = config.height, config.width
        shape = Shape(index.cameras, height, width, config.generator_channels, config.blocks, config.skip)
        self.generator = Generator(shape)
        self.discriminator = Discriminator(index.num_cameras, height, width, config.discriminator_channels)
        self.networks = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        self.networks.to(device, self.dtype)
        self.optimizers = {}
        for network in (self.generator, self.discriminator):
            optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, betas=(0.5, 0.999))
            for parameter in network.parameters():  # what its first step would make, for a checkpoint to fill
                zeros = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
                optimizer.state[parameter] = dict(zip(ADAM_STATE, (*zeros, torch.zeros(())), strict=True))
            self.optimizers[network] = optimizer
        shards, size = self.split.shard_samples, config.batch_size
        self.plan = PassPlan(shards, size, size, config.seed, "styles", sized_by="--batch_size")
        self.stream = TrainStream(
            self.split,
            self.plan,
            height=height,
            width=width,
            augmentation=None,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.workers,
            device=device,
        )
        self._wanted_draws = Draws(config.seed, "styles", "wanted cameras")
        self._sample_draws = Draws(config.seed, "styles", "mixing and flips")
        self.checkpoints = CheckpointStore(Path(config.output_dir) / "checkpoints")
        self.step = 0
        self.saved_step: int | None = None
        num_losses = len(CRITIC) + len(GENERATOR) + 1
        self.interval = Interval(torch.zeros(num_losses, dtype=self.dtype, device=device))

    def fit(self, stop: StopRequest) -> bool:
        """Train from the present position to the end; False where any rank was asked to `stop`: that is saved.

        Collective. Raises `UserError` on all ranks for bad data, losses that are not finite, and a full disk.
        """
        config, total, folder = self.config, self.config.steps, Path(self.config.output_dir)
        sizes = {"first_step": self.step, "total_steps": total}
        tracker = distributed.together(lambda: Tracker(folder, **sizes, tensorboard=False))
        batches = self.stream.batches(self.step, total)
        try:
            while self.step < total:
                distributed.at_step(self.step)
                started = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - started
                bad, stops = distributed.any_rank_of(batch.error is not None, bool(stop))
                if bad:
                    distributed.raise_together(batch.error)
                if stops:
                    stop.signal = stop.signal or "another rank's signal"
                    if self.saved_step != self.step:
                        self.save()
                    return False
                self.interval.add(self.train_step(batch.images), waited, 0)
                self.step += 1
                saves = self.step % config.checkpoint_steps == 0 or self.step == total
                if saves or self.step % config.log_steps == 0:
                    self._report(tracker, ends=saves)
                if saves:
                    self.save()
            return True
        finally:
            tracker.close()
            self.stream.close()

    def train_step(self, images_b3HW: Tensor) -> Tensor:
        """One step of the discriminator on this rank's pictures, and every `critic_steps`-th one of the generator.

        Returns the losses `CRITIC` and `GENERATOR` and whether the generator took a step, as `Interval` adds them up.
        """
        config, step = self.config, self.step
        rows_b = self.plan.step(step, distributed.rank(), distributed.world_size()).rows_b
        camids_b = self._on_device(self.split.camids[rows_b])
        wanted_b = self._on_device(self.wanted(step))
        chances_2b = self._sample_draws.uniforms(2, (0, self.split.indices[rows_b], step)).T
        mixing_b = self._on_device(chances_2b[0]).to(self.dtype)
        flips_b = self._on_device(chances_2b[1] < 0.5)
        real_b3HW = to_unit(images_b3HW, self.dtype)
        real_b3HW = torch.where(flips_b[:, None, None, None], real_b3HW.flip(3), real_b3HW)
        with autocast(config.precision, self.device):
            with torch.no_grad():
                fake_b3HW = self.generator(real_b3HW, wanted_b).to(self.dtype)
            found = critic_losses(self.discriminator, real_b3HW, fake_b3HW, camids_b, mixing_b)
        loss = found["critic"] + config.penalty_weight * found["penalty"] + config.camera_weight * found["camera_real"]
        self._apply(self.discriminator, loss)
        if turn := (step + 1) % config.critic_steps == 0:
            with autocast(config.precision, self.device):
                found |= generator_losses(self.generator, self.discriminator, real_b3HW, camids_b, wanted_b)
            loss = found["generator"] + config.camera_weight * found["camera"] + config.cycle_weight * found["cycle"]
            self._apply(self.generator, loss)
        zero = torch.zeros_like(loss)
        losses = [found.get(name, zero) for name in (*CRITIC, *GENERATOR)]
        return torch.stack([*losses, zero + turn]).detach()

    def wanted(self, step: int) -> np.ndarray:
        """(b,) int64: this rank's part of a permutation of the global batch's cameras."""
        camids_B = self.split.camids[self.plan.step(step).rows_b]
        wanted_B = camids_B[self._wanted_draws.permutation(len(camids_B), (0, 0, step))]
        return np.split(wanted_B, distributed.world_size())[distributed.rank()]

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _apply(self, network: Generator | Discriminator, loss: Tensor) -> None:
        """A step of the network's optimiser by the gradients of the mean `loss` of all ranks.

        They are summed by one all-reduce here, not by DistributedDataParallel's hooks, which see only one backward
        pass of a forward pass, while the penalty's goes through the discriminator twice.
        """
        optimizer = self.optimizers[network]
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, 2 * (1 - (self.step + 0.5) / self.config.steps))
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        summed = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        summed = (summed / distributed.world_size()).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, summed, strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def save(self) -> None:
        """Write a checkpoint of the present position. Collective."""
        meta = {"data": self.data, "device": self.device.type, "config": flatten(self.config)}
        self.checkpoints.save(self.step, self._state(), meta)
        self.saved_step = self.step

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`, written on any number of ranks. Collective."""
        meta = distributed.together(lambda: read_meta(checkpoint))
        state = self._state()
        load(checkpoint, state)
        self.step = self.saved_step = meta["step"]
        if INTERVAL in state:
            self.interval.load_sums(state[INTERVAL], most_steps=self.step)
        log.info("continuing from %s, step %d", checkpoint, self.step)

    def _state(self) -> dict[str, Tensor]:
        """Both networks and optimisers, as views that a load fills, and the losses since the last line of metrics."""
        state = {}
        for name, parameter in self.networks.named_parameters():
            network = self.generator if name.startswith("generator.") else self.discriminator
            state[f"network.{name}"] = parameter.detach()
            state |= {f"optimizer.{key}.{name}": self.optimizers[network].state[parameter][key] for key in ADAM_STATE}
        return state | {INTERVAL: self.interval.sums()}

    def _report(self, tracker: Tracker, ends: bool) -> None:
        """Write one line of metrics, and begin another interval. Collective."""
        interval = self.interval
        *losses, turns = interval.mean_losses()
        record: dict[str, Any] = {f"loss_{name}": value for name, value in zip(CRITIC, losses, strict=False)}
        for name, value in zip(GENERATOR, losses[len(CRITIC) :], strict=True):
            record[f"loss_{name}"] = value / turns if turns else None
        speed = interval.steps_here * self.config.batch_size / (time.monotonic() - interval.started)
        wait = interval.data_wait / max(interval.steps_here, 1)
        at = {"step": self.step - 1, "epoch": (self.step - 1) // self.plan.steps_per_pass}
        tracker.metrics(at | record | {"images_per_second": speed, "data_wait": wait})
        wrong = [f"{name} {value}" for name, value in record.items() if value is not None and not math.isfinite(value)]
        if not is_finite(self.networks):  # by the newest step
            wrong.append("weights that are not finite")
        if wrong:
            raise UserError(f"at step {self.step}: {', '.join(wrong)}; lower --lr", on_all_ranks=True)
        figures = "  ".join(f"{name[5:]} {value:.3f}" for name, value in record.items() if value is not None)
        tracker.progress(self.step - 1, "styles", f"{figures}  {speed:.0f} images/s", epoch_ended=ends)
        self.interval = Interval(torch.zeros_like(interval.losses))
