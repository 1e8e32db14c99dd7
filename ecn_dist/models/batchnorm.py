"""BatchNorm over the global batch (`sync`) on any device, and the re-estimation of its statistics (AdaBN).

PyTorch's own SyncBatchNorm needs an accelerator. `GlobalBatchNorm` is the same computation with this project's
collectives, so that many ranks can be held against one anywhere.

Shape letters: b images here, C channels, n = b x positions values per channel here, W ranks.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ecn_dist.distributed import all_gather_rows, all_reduce, world_size

BatchNormMode = Literal["sync", "group", "local"]


class _NormalizeOverRanks(torch.autograd.Function):
    """Batch normalisation with the mean and variance of all ranks' batches (of equal size).

    Forward: one all-gather of (2, C). Backward: one all-reduce of (2, C).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        n = x.numel() // x.shape[1]
        mean_C = x.mean(dims)
        squares_C = (x - _along_channels(mean_C, x)).square().sum(dims)
        parts_W2C = all_gather_rows(torch.stack([mean_C, squares_C])[None])
        # Chan et al. 1979: squares about the common mean, without the cancellation of E[x^2] - E[x]^2.
        mean_C = parts_W2C[:, 0].mean(0)
        squares_C = parts_W2C[:, 1].sum(0) + n * (parts_W2C[:, 0] - mean_C).square().sum(0)
        var_C = squares_C / (n * world_size())
        inverse_std_C = torch.rsqrt(var_C + eps)
        normal = (x - _along_channels(mean_C, x)) * _along_channels(inverse_std_C, x)
        ctx.save_for_backward(normal, weight, inverse_std_C)
        ctx.mark_non_differentiable(mean_C, var_C)
        return normal * _along_channels(weight, x) + _along_channels(bias, x), mean_C, var_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normal, weight, inverse_std_C = ctx.saved_tensors
        dims = [0, *range(2, grad.dim())]
        n = grad.numel() // grad.shape[1]
        bias_grad_C = grad.sum(dims)
        weight_grad_C = (grad * normal).sum(dims)
        means_2C = all_reduce(torch.stack([bias_grad_C, weight_grad_C])) / (n * world_size())
        centred = grad - _along_channels(means_2C[0], grad) - normal * _along_channels(means_2C[1], grad)
        return centred * _along_channels(weight * inverse_std_C, grad), weight_grad_C, bias_grad_C, None


def _along_channels(values_C: Tensor, like: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (like.dim() - 2))


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of the global batch; 2-D to 5-D input, equal batches on all ranks.

    State-dict compatible with `nn.BatchNorm1d/2d`. On one rank, and in evaluation mode, it is `F.batch_norm`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        # As torch's own BatchNorm under autocast: statistics in the parameters' precision.
        x = input.to(self.weight.dtype)
        output, mean_C, var_C = _NormalizeOverRanks.apply(x, self.weight, self.bias, self.eps)
        self._update_running(mean_C, var_C, input.numel() // input.shape[1] * world_size())
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean_C: Tensor, var_C: Tensor, n: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(var_C * (n / max(n - 1, 1)), momentum)


def convert_batchnorm(module: nn.Module, mode: BatchNormMode, device: torch.device) -> nn.Module:
    """Give every BatchNorm in `module` the statistics of the global batch (`sync`), or leave them alone (`local`)."""
    if mode == "local" or world_size() == 1:
        return module
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _convert_to_global(module)


def _convert_to_global(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm):
        converted = GlobalBatchNorm(module.num_features, module.eps, module.momentum)
        converted.load_state_dict(module.state_dict())
        converted.to(module.weight.device, module.weight.dtype)
        for name, parameter in converted.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
        converted.train(module.training)
        return converted
    for name, child in module.named_children():
        module.add_module(name, _convert_to_global(child))
    return module


@torch.no_grad()
def average_local_statistics(network: nn.Module) -> None:
    """Give every `local` BatchNorm in training the mean of all ranks' running statistics. Collective: one all-reduce.

    So that there is one network to save and to evaluate. Training does not read these statistics, and as they and
    their average over ranks are both linear, it is the same whether they are averaged now and then or only at last.
    """
    local = [
        norm
        for norm in network.modules()
        if isinstance(norm, _BatchNorm)
        and not isinstance(norm, GlobalBatchNorm | nn.SyncBatchNorm)
        and norm.training  # frozen ones are equal on all ranks, and stay so to the last bit
        and norm.running_mean is not None
    ]
    if world_size() == 1 or not local:
        return
    buffers = [buffer for norm in local for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    means = all_reduce(torch.cat(buffers)) / world_size()
    for buffer, mean in zip(buffers, means.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """AdaBN (Li et al. 2016): replace every BatchNorm's running statistics by their average over `batches`.

    `network` is called once on each batch of images; parameters stay as they are. With `sync` BatchNorm every rank
    must give the same number of batches.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for a cumulative average
        norm.train()
    for images in batches:
        network(images)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.train(training)
