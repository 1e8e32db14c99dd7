"""What carries a step's gradients between ranks, in which precision: the trainer's step reads the same under each."""

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ecn_dist.distributed import entering, world_size
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Method, Step
from ecn_dist.models import autocast, average_local_statistics

# What an optimiser keeps of a parameter: our name for it in checkpoints, and torch's.
OPTIMIZER_STATE = {
    torch.optim.SGD: {"momentum": "momentum_buffer"},
    torch.optim.Adam: {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"},
}


class _InPrecision(nn.Module):
    """The network in the run's precision: DeepSpeed turns off an autocast that it meets outside its module's forward.

    Without inputs its gradients arrive in one order, last parameter first: DistributedDataParallel lays out what it
    sums by the order of its first backward, and so decides in which order three or more ranks are added. With this as
    its first, a continued run rounds as the uninterrupted one does.
    """

    def __init__(self, network: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self._precision, self._device = precision, device
        self._dtype = torch.float64 if precision == "fp64" else torch.float32

    def forward(self, images: Mapping[str, Tensor] | None = None, at: Step | None = None) -> Any:
        if images is None:
            return functools.reduce(torch.add, (p.sum() for p in self.network.parameters() if p.requires_grad))
        with autocast(self._precision, self._device):
            outputs = self.network({name: pictures.to(self._dtype) for name, pictures in images.items()}, at)
        return {name: output.to(self._dtype) for name, output in outputs.items()}


class Strategy(ABC):
    """The network, its optimiser and its precision."""

    def __init__(self, network: Method, optimizer: torch.optim.Optimizer, precision: str, device: torch.device) -> None:
        self.network = network
        self.optimizer = optimizer
        self._in_precision = _InPrecision(network, precision, device)
        self._wrapped: nn.Module = self._in_precision
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._kept = OPTIMIZER_STATE[type(optimizer)]

    @abstractmethod
    def begin_phase(self, source_only: bool) -> None:
        """Train what the method trains on the source alone, or afterwards. Call it before a phase's first step here."""

    def forward(self, images: Mapping[str, Tensor], at: Step) -> dict[str, Tensor]:
        """`Method.forward` in the run's precision; outputs in fp32 (fp64 in fp64 runs)."""
        return self._wrapped(images, at)

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
        entering("gathering of weights and optimiser state")
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
        """Take over, before any step, what `state` returned, once filled; without "scaler" the loss scale stays."""
        self.network.load_state_dict({key: state[f"network.{key}"] for key in self.network.state_dict()})
        for name, parameter in self._trained.items():
            kept = {theirs: state[f"optimizer.{ours}.{name}"] for ours, theirs in self._kept.items()}
            self._keep(parameter, state[f"network.{name}"], kept)
        if "scaler" in state:
            scale, steps_since_overflow = state["scaler"].tolist()
            if not (0 < scale < math.inf and 0 <= steps_since_overflow < math.inf):
                found = f"the loss scale is {scale}, for {steps_since_overflow} steps"
                raise UserError(f"{found}: this is damaged; take an earlier checkpoint", on_all_ranks=True)
            self._set_loss_scale(scale, int(steps_since_overflow))

    def _start_optimizer_state(self) -> None:
        """Make what torch's optimisers make at a parameter's first step, the same: zeros."""
        for parameter in (parameter for group in self.optimizer.param_groups for parameter in group["params"]):
            zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in self._kept.values()}
            self.optimizer.state[parameter] = zeros | ({"step": torch.zeros(())} if "step" in zeros else {})

    # Weights and optimiser state (by torch's keys) where each rank has all of them.

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def _optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self.optimizer.state[parameter][key]

    def _keep(self, parameter: nn.Parameter, weight: Tensor, kept: dict[str, Tensor]) -> None:
        for key, tensor in kept.items():
            self.optimizer.state[parameter][key].copy_(tensor)

    # A loss scale, where there is one, comes with the steps since an overflow or doubling.
    _step: Callable[[], bool]
    _loss_scale: Callable[[], tuple[float, int] | None]
    _set_loss_scale: Callable[[float, int], None]


class DataParallel(Strategy):
    """PyTorch's DistributedDataParallel, or the bare network on one rank, with autocast and loss scaling."""

    def __init__(self, network: Method, optimizer: torch.optim.Optimizer, *, precision: str, device: torch.device):
        super().__init__(network, optimizer, precision, device)
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._idle: set[str] | None = None
        self._start_optimizer_state()

    def begin_phase(self, source_only: bool) -> None:
        idle = set(self.network.idle_parameters(source_only))
        if idle == self._idle:
            return
        self._idle = idle
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name not in idle)
        if world_size() > 1:
            # Buffers differ between ranks only with local BatchNorm, on purpose. Torch 2.13 renamed the option.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            options["device_ids"] = None if self._device.type == "cpu" else [self._device]
            self._wrapped = DistributedDataParallel(self._in_precision, gradient_as_bucket_view=True, **options)
            self._wrapped().backward()
            self.optimizer.zero_grad(set_to_none=True)

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

    def _loss_scale(self) -> tuple[float, int] | None:
        scaler = self._scaler.state_dict()
        return (scaler["scale"], scaler["_growth_tracker"]) if self._scaler.is_enabled() else None

    def _set_loss_scale(self, scale: float, steps_since_overflow: int) -> None:
        changed = {"scale": scale, "_growth_tracker": steps_since_overflow}
        self._scaler.load_state_dict(self._scaler.state_dict() | changed)
