"""The step through DeepSpeed: its gradient exchange, ZeRO, and its loss scaling. Imported only when chosen.

DeepSpeed's own bf16 and fp16 modes cast the weights and leave BatchNorm's statistics in fp32, a mixture that torch's
BatchNorm refuses. So the network keeps fp32 weights and runs under autocast, as with `DataParallel`; in fp16 the
dynamic loss scaler of DeepSpeed scales, checks all ranks' gradients, and skips.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ecn_dist.distributed import entering, is_distributed, world_size
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Method
from ecn_dist.training.strategy import Strategy


class DeepSpeed(Strategy):
    """A `Strategy` over a DeepSpeed engine; its checkpoints have `DataParallel`'s tensors, and load under either."""

    def __init__(
        self, network: Method, optimizer: torch.optim.Optimizer, precision: str, device: torch.device, zero_stage: int
    ) -> None:
        """`zero_stage` is 0 (nothing divided), 1 (optimiser state) or 2 (gradients too). Collective.

        Raises `UserError` without DeepSpeed, without a process group, for fp64, and for fp16 in stage 0.
        """
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it would look for one, and find another than ours
        try:
            import deepspeed
        except ImportError as error:
            remedy = "pip install 'ecn_dist[deepspeed]', or use engine ddp"
            raise UserError(f"engine: deepspeed is not installed ({error}); {remedy}") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On the CPU it would compile an exchange through shared memory, for minutes and only where there is a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if precision == "fp64":
            raise UserError("precision: DeepSpeed has no fp64; use fp32, bf16 or fp16, or engine ddp")
        if precision == "fp16" and zero_stage == 0:
            raise UserError("precision: DeepSpeed scales the loss for fp16 from deepspeed.zero_stage 1 on; 0 is as ddp")
        if not is_distributed():
            raise UserError("engine: deepspeed needs torchrun's process group, also for one rank: torchrun -m ...")
        super().__init__(network, optimizer, precision, device)
        self._utils: Any = deepspeed.utils
        self._zero_stage = zero_stage
        self._group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        config = {
            "train_micro_batch_size_per_gpu": network.setting.global_batch_size // world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its default clips to a norm of 1
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,  # SGD and Adam work on flat parts as on whole tensors
        }
        about = {"model": self._in_precision, "optimizer": optimizer, "config": config}
        self._engine, *_ = deepspeed.initialize(**about, dist_init_required=False)
        self._wrapped = self._engine
        self._scaler: Any = None
        if precision == "fp16":  # as for fp16 weights: as torch's GradScaler, from 2^16 on, doubled in 2000 steps
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            growth: dict[str, Any] = {"init_scale": 2.0**16, "scale_window": 2000, "min_scale": 1.0}
            skips: dict[str, Any] = {"delayed_shift": 1, "consecutive_hysteresis": False}
            self._scaler = DynamicLossScaler(**growth, **skips, raise_error_at_min_scale=False)
            self._engine.optimizer.loss_scaler = self._scaler
            self._engine.optimizer.check_grad_overflow = True
        self._start_optimizer_state()  # DeepSpeed finds only what is there
        if zero_stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def begin_phase(self, source_only: bool) -> None:
        """Nothing changes: ZeRO takes what has no gradient in a phase as zero."""

    def backward(self, loss: Tensor) -> None:
        entering("DeepSpeed's gradient exchange")
        self._engine.backward(loss)

    def _step(self) -> bool:
        entering("DeepSpeed's step")
        self._engine.step()
        return self._engine.was_step_applied()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        return self._utils.safe_get_full_fp32_param(parameter) if self._zero_stage else super()._weight(parameter)

    def _optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        if not self._zero_stage:
            return super()._optimizer_state(parameter, key)
        if key == "step":
            return self._steps_of_group(parameter).clone()
        return self._utils.safe_get_full_optimizer_state(parameter, key)

    def _keep(self, parameter: nn.Parameter, weight: Tensor, kept: dict[str, Tensor]) -> None:
        if not self._zero_stage:
            return super()._keep(parameter, weight, kept)
        self._utils.safe_set_full_fp32_param(parameter, weight)
        for key, tensor in kept.items():
            if key == "step":  # its latest, as some parameters idled on the source alone
                steps = self._steps_of_group(parameter)
                steps.copy_(torch.maximum(steps, tensor.to(steps.device)))
            else:
                self._utils.safe_set_full_optimizer_state(parameter, tensor, key)
        return None

    def _steps_of_group(self, parameter: nn.Parameter) -> Tensor:
        """With ZeRO all parameters of a group have one count, that of this rank's part of the group."""
        return self.optimizer.state[self._group_of[parameter]["params"][0]]["step"]

    def _loss_scale(self) -> tuple[float, int] | None:
        if (scaler := self._scaler) is None:
            return None
        return scaler.cur_scale, (scaler.cur_iter - scaler.last_overflow_iter) % scaler.scale_window

    def _set_loss_scale(self, scale: float, steps_since_overflow: int) -> None:
        self._scaler.cur_scale = scale
        self._scaler.last_overflow_iter = self._scaler.cur_iter - steps_since_overflow
