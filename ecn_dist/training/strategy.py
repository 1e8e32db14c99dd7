"""What carries a step's gradients between ranks, in which precision.

A strategy wraps the network: `forward`, `backward`, `step`. The trainer's step reads the same under each of them.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

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


class Strategy(ABC):
    """The network, its optimiser and its precision."""

    def __init__(self, network: Method, optimizer: torch.optim.Optimizer) -> None:
        self.network = network
        self.optimizer = optimizer
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._kept = OPTIMIZER_STATE[type(optimizer)]

    @abstractmethod
    def begin_phase(self, source_only: bool) -> None:
        """Train what the method trains on the source alone, or afterwards. Call it before a phase's first step here."""

    @abstractmethod
    def forward(self, images: Mapping[str, Tensor], at: Step) -> dict[str, Tensor]:
        """`Method.forward` in the run's precision; outputs in fp32 (fp64 in fp64 runs)."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, averaged over ranks."""

    def step(self, learning_rate_factor: float) -> bool:
        """One optimiser step. False where it was skipped, on all ranks alike, because of an overflow."""
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * learning_rate_factor
        return self._step()

    def state(self) -> dict[str, Tensor]:
        """Network, optimiser and loss scale as tensors, for a checkpoint to write, or to fill in place. Collective."""
        average_local_statistics(self.network)
        state = {f"network.{key}": tensor for key, tensor in self.network.state_dict().items()}
        for name, parameter in self._trained.items():
            state[f"network.{name}"] = self._weight(parameter)
            for ours, theirs in self._kept.items():
                state[f"optimizer.{ours}.{name}"] = self._optimizer_state(parameter, theirs)
        if (scale := self._loss_scale()) is not None:
            state["scaler"] = torch.tensor(scale, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned, once it was filled."""
        self.network.load_state_dict({key: state[f"network.{key}"] for key in self.network.state_dict()})
        for name, parameter in self._trained.items():
            kept = {theirs: state[f"optimizer.{ours}.{name}"] for ours, theirs in self._kept.items()}
            self._keep(parameter, state[f"network.{name}"], kept)
        if self._loss_scale() is not None:
            scale, steps_since_overflow = state["scaler"].tolist()
            self._set_loss_scale(scale, int(steps_since_overflow))

    # What a strategy has of its own. Keys of optimiser state are torch's; a loss scale, where there is one, comes with
    # the steps since an overflow or doubling.
    _step: Callable[[], bool]
    _optimizer_state: Callable[[nn.Parameter, str], Tensor]
    _keep: Callable[[nn.Parameter, Tensor, dict[str, Tensor]], None]
    _loss_scale: Callable[[], tuple[float, int] | None]
    _set_loss_scale: Callable[[float, int], None]

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()


def initial_state(parameter: Tensor, key: str) -> Tensor:
    """What an optimiser keeps of a parameter before its first step, by torch's name."""
    return torch.zeros(()) if key == "step" else torch.zeros_like(parameter, requires_grad=False)


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


class DataParallel(Strategy):
    """PyTorch's DistributedDataParallel, or the bare network on one rank, with autocast and loss scaling."""

    def __init__(self, network: Method, optimizer: torch.optim.Optimizer, *, precision: str, device: torch.device):
        super().__init__(network, optimizer)
        self._device = device
        self._precision = precision
        self._dtype = torch.float64 if precision == "fp64" else torch.float32
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
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

    def _step(self) -> bool:
        scale_before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # The gradients are averages over ranks, so every rank sees the same overflow.
        return self._scaler.get_scale() >= scale_before

    def _optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        # The optimiser makes its state at a parameter's first step, the same as starting from zero.
        kept = self.optimizer.state[parameter].get(key)
        return initial_state(parameter, key) if kept is None else kept

    def _keep(self, parameter: nn.Parameter, weight: Tensor, kept: dict[str, Tensor]) -> None:
        self.optimizer.state[parameter].update({key: tensor.detach() for key, tensor in kept.items()})

    def _loss_scale(self) -> tuple[float, int] | None:
        scaler = self._scaler.state_dict()
        return (scaler["scale"], scaler["_growth_tracker"]) if self._scaler.is_enabled() else None

    def _set_loss_scale(self, scale: float, steps_since_overflow: int) -> None:
        changed = {"scale": scale, "_growth_tracker": steps_since_overflow}
        self._scaler.load_state_dict(self._scaler.state_dict() | changed)
