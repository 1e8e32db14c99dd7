"""What carries a step's gradients between ranks, in which precision.

A strategy wraps the network: `forward`, `backward`, `step`. The trainer's step reads the same under each of them.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ecn_dist.distributed import entering, world_size
from ecn_dist.methods.base import Method, Step
from ecn_dist.models import autocast, average_local_statistics

# What an optimiser keeps of a parameter: our name for it in checkpoints, and torch's.
OPTIMIZER_STATE = {
    torch.optim.SGD: {"momentum": "momentum_buffer"},
    torch.optim.Adam: {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"},
}


class Strategy(Protocol):
    """The network, its optimiser and its precision."""

    network: Method

    def begin_phase(self, source_only: bool) -> None:
        """Train what the method trains on the source alone, or afterwards. Call it before a phase's first step here."""

    def forward(self, images: Mapping[str, Tensor], at: Step) -> dict[str, Tensor]:
        """`Method.forward` in the run's precision; outputs in fp32 (fp64 in fp64 runs)."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, averaged over ranks."""

    def step(self, learning_rate_factor: float) -> bool:
        """One optimiser step. False where it was skipped, on all ranks alike, because of an overflow."""

    def state(self) -> dict[str, Tensor]:
        """Network, optimiser and loss scale as tensors, for a checkpoint to write, or to fill in place. Collective."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned, once it was filled."""


class _Rehearsed(nn.Module):
    """The network; called without inputs, something whose gradients arrive in one order, last parameter first.

    DistributedDataParallel lays out what it sums by the order of its first backward, and the layout decides in which
    order three or more ranks are added. With this as its first, a continued run rounds as the uninterrupted one does.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        if inputs:
            return self.network(*inputs)
        return functools.reduce(torch.add, (p.sum() for p in self.network.parameters() if p.requires_grad))


class DataParallel:
    """PyTorch's DistributedDataParallel, or the bare network on one rank, with autocast and loss scaling."""

    def __init__(self, network: Method, optimizer: torch.optim.Optimizer, *, precision: str, device: torch.device):
        self.network = network
        self.optimizer = optimizer
        self._device = device
        self._precision = precision
        self._dtype = torch.float64 if precision == "fp64" else torch.float32
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._kept = OPTIMIZER_STATE[type(optimizer)]
        self._wrapped: nn.Module = network
        self._idle: set[str] | None = None

    def begin_phase(self, source_only: bool) -> None:
        idle = set(self.network.idle_parameters(source_only))
        if idle == self._idle:
            return
        self._idle = idle
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name not in idle)
        if world_size() > 1:
            # Buffers differ between ranks only with local BatchNorm, and then on purpose. The option's name changed
            # with torch 2.13.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self._wrapped = DistributedDataParallel(
                _Rehearsed(self.network),
                device_ids=[self._device] if self._device.type != "cpu" else None,
                gradient_as_bucket_view=True,
                **no_buffers,
            )
            self._wrapped().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def forward(self, images: Mapping[str, Tensor], at: Step) -> dict[str, Tensor]:
        with autocast(self._precision, self._device):
            outputs = self._wrapped({name: pictures.to(self._dtype) for name, pictures in images.items()}, at)
        return {name: output.to(self._dtype) for name, output in outputs.items()}

    def backward(self, loss: Tensor) -> None:
        entering("gradient all-reduce")
        self._scaler.scale(loss).backward()

    def step(self, learning_rate_factor: float) -> bool:
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * learning_rate_factor
        scale_before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # The gradients are averages over ranks, so every rank sees the same overflow.
        return self._scaler.get_scale() >= scale_before

    def state(self) -> dict[str, Tensor]:
        average_local_statistics(self.network)
        state = {f"network.{key}": tensor for key, tensor in self.network.state_dict().items()}
        for name, parameter in self._trained.items():
            for ours, theirs in self._kept.items():
                # The optimiser makes its state at a parameter's first step, the same as starting from zero.
                kept = self.optimizer.state[parameter].get(theirs)
                zeros = torch.zeros(()) if ours == "step" else torch.zeros_like(parameter)
                state[f"optimizer.{ours}.{name}"] = zeros if kept is None else kept
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict({key: state[f"network.{key}"] for key in self.network.state_dict()})
        for name, parameter in self._trained.items():
            for ours, theirs in self._kept.items():
                self.optimizer.state[parameter][theirs] = state[f"optimizer.{ours}.{name}"].detach()
        if self._scaler.is_enabled():
            scale, growth = state["scaler"].tolist()
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})
