"""BatchNorm over the global batch (`sync`) or groups of it (`group`), and re-estimation of its statistics (AdaBN).

`sync` on an accelerator is PyTorch's own SyncBatchNorm. `GlobalBatchNorm` is the same computation with this project's
collectives, for any device and for groups of pictures, so that many ranks can be held against one anywhere.

Shape letters: b images here, B on all ranks, C channels, K groups in the global batch, W ranks.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ecn_dist.distributed import all_gather_rows, all_reduce, rank, world_size
from ecn_dist.errors import UserError

BatchNormMode = Literal["sync", "group", "local"]


class _NormalizeOverRanks(torch.autograd.Function):
    """Batch normalisation over groups of `group` consecutive images of the global batch, wherever their ranks are.

    Forward: one all-gather of (K, 2, C). Backward: one all-reduce of (K, 2, C). b is equal on all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, positions = x.shape[0], x[0, 0].numel()
        counts, group_of_b, shares_WK1 = _layout(b, group, rank(), world_size(), x.dtype, x.device)
        sums_K2C, dims = x.new_zeros(shares_WK1.shape[1], 2, x.shape[1]), [0, *range(2, x.dim())]
        for k, part in zip(counts, x.split([*counts.values()]), strict=True):
            mean_C = part.mean(dims)
            sums_K2C[k, 0] = mean_C
            sums_K2C[k, 1] = (part - _along_channels(mean_C, x)).square().sum(dims)
        sums_WK2C = all_gather_rows(sums_K2C[None])
        # Chan et al. 1979: squares about the common mean, without the cancellation of E[x^2] - E[x]^2.
        mean_KC = (shares_WK1 * sums_WK2C[:, :, 0]).sum(0) / shares_WK1.sum(0)
        apart_KC = (shares_WK1 * (sums_WK2C[:, :, 0] - mean_KC).square()).sum(0)
        var_KC = (sums_WK2C[:, :, 1].sum(0) + b * positions * apart_KC) / (group * positions)
        inverse_std_KC = torch.rsqrt(var_KC + eps)
        normal = (x - _along_channels(mean_KC[group_of_b], x)) * _along_channels(inverse_std_KC[group_of_b], x)
        ctx.save_for_backward(normal, weight, inverse_std_KC, group_of_b)
        ctx.group, ctx.counts = group, counts
        ctx.mark_non_differentiable(mean_KC, var_KC)
        return normal * _along_channels(weight, x) + _along_channels(bias, x), mean_KC, var_KC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        normal, weight, inverse_std_KC, group_of_b = ctx.saved_tensors
        dims = [0, *range(2, grad.dim())]
        sums_K2C = grad.new_zeros(len(inverse_std_KC), 2, grad.shape[1])
        sizes = [*ctx.counts.values()]
        for k, grad_part, normal_part in zip(ctx.counts, grad.split(sizes), normal.split(sizes), strict=True):
            sums_K2C[k, 0] = grad_part.sum(dims)
            sums_K2C[k, 1] = (grad_part * normal_part).sum(dims)
        means_b2C = (all_reduce(sums_K2C) / (ctx.group * grad[0, 0].numel()))[group_of_b]
        centred = grad - _along_channels(means_b2C[:, 0], grad) - normal * _along_channels(means_b2C[:, 1], grad)
        scale_bC = weight * inverse_std_KC[group_of_b]
        bias_grad_C, weight_grad_C = sums_K2C.sum(0)
        return centred * _along_channels(scale_bC, grad), weight_grad_C, bias_grad_C, None, None


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    """(C,) or (b, C), to be combined with the (b, C, ...) of `like`."""
    return values.view(-1, like.shape[1], *[1] * (like.dim() - 2))


@functools.lru_cache(maxsize=64)
def _layout(
    b: int, group: int, rank: int, world_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Counter[int], Tensor, Tensor]:
    """How many images here each group has, in their order; (b,) the group of each; (W, K, 1) its shares of the ranks'.

    Kept, so that a step on an accelerator copies nothing to it.
    """
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        groups_Wb = (torch.arange(b * world_size) // group).view(world_size, b)
        shares_WK = F.one_hot(groups_Wb).sum(1).double() / b
        group_of_b = groups_Wb[rank]
        return Counter(group_of_b.tolist()), group_of_b.to(device), shares_WK[..., None].to(device, dtype)


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of the global batch, or of groups of `group` images in its order.

    2-D to 5-D input, equal batches on all ranks. `convert_batchnorm` makes it of `nn.BatchNorm1d/2d`. The running
    statistics are equal on all ranks: they follow the mean of the groups' means and unbiased variances.

    Collective in training mode, but for `sync` on one rank. Raises `UserError` where groups do not divide the batch.
    """

    group: int = 0  # 0: the global batch

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        output = self._normalised(input)
        for afterwards in self.children():  # dropout and activation, of timm's BatchNorms that are these as well
            output = afterwards(output)
        return output

    def _normalised(self, input: Tensor) -> Tensor:
        b, ranks = input.shape[0], world_size()
        group = self.group or b * ranks
        if not self.training:
            return super().forward(input)
        check_statistics("group" if self.group else "sync", group, b * ranks, ranks)
        if ranks == 1 and group == b:
            return super().forward(input)
        if b % group == 0:
            return self._whole_groups(input, group)
        # As torch's own BatchNorm under autocast: statistics in the parameters' precision.
        x = input.to(self.weight.dtype)
        output, mean_KC, var_KC = _NormalizeOverRanks.apply(x, self.weight, self.bias, self.eps, group)
        n = group * input[0, 0].numel()
        self._update_running(mean_KC.mean(0), var_KC.mean(0) * (n / max(n - 1, 1)))
        return output.to(input.dtype)

    def _whole_groups(self, input: Tensor, group: int) -> Tensor:
        """Each group lies on one rank: torch's own kernels, one call a group."""
        statistics_2C = self.weight.new_zeros(2, self.num_features)
        outputs = []
        for part in input.split(group):
            mean_C, var_C = self.weight.new_zeros(2, self.num_features)
            outputs.append(F.batch_norm(part, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps))
            statistics_2C += torch.stack([mean_C, var_C])
        self._update_running(*all_reduce(statistics_2C) / (len(outputs) * world_size()))
        return torch.cat(outputs)

    @torch.no_grad()
    def _update_running(self, mean_C: Tensor, var_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(var_C, momentum)


def convert_batchnorm(module: nn.Module, mode: BatchNormMode, device: torch.device, group: int = 0) -> nn.Module:
    """Give every BatchNorm in `module`, which will run on `device`, the statistics of `mode`.

    These are of the global batch (`sync`), of each `group` consecutive images of it, or of a rank's part (`local`).
    Returns the module, or what replaces a lone BatchNorm; changed in place, its parameters and buffers staying the same
    tensors. The order against `freeze` is free.
    """
    if mode == "local" or (mode == "sync" and world_size() == 1):
        return module
    if mode == "sync" and device.type != "cpu" and not any(any(norm.children()) for norm in _batchnorms(module)):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in _batchnorms(module):
        norm.__class__ = GlobalBatchNorm  # it has nothing but `group` beyond theirs; hooks and mode stay
        assert isinstance(norm, GlobalBatchNorm)
        norm.group = group if mode == "group" else 0
    return module


def _batchnorms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def check_statistics(mode: BatchNormMode, group: int, batch: int, ranks: int) -> None:
    """Refuse a pass of `batch` images, over all `ranks`, that BatchNorm cannot normalise.

    Raises `UserError` on all ranks where `group` does not divide the batch, or the statistics would be of one image.
    """
    images = {"sync": batch, "group": group, "local": batch // ranks}[mode]
    if mode == "group" and (group < 1 or batch % group):
        fitting = ", ".join(str(size) for size in range(2, batch + 1) if batch % size == 0)
        problem = f"_group: {group} does not divide a batch of {batch} pictures; these would do: {fitting}"
    elif images < 2:
        found = f"need at least 2 pictures, and here they are of {images} ({batch} a pass on {ranks} ranks)"
        remedy = {"sync": "", "group": " or model.batchnorm_group", "local": ", fewer ranks, or sync"}[mode]
        problem = f": {mode} statistics {found}; use a larger global_batch_size{remedy}"
    else:
        return
    raise UserError(f"model.batchnorm{problem}", on_all_ranks=True)


@torch.no_grad()
def average_local_statistics(network: nn.Module) -> None:
    """Give every `local` BatchNorm in training the mean of all ranks' running statistics. Collective: one all-reduce.

    So that there is one network to save and to evaluate. Training does not read these statistics, and as they and
    their average over ranks are both linear, it is the same whether they are averaged now and then or only at last.
    """
    # Frozen ones are equal on all ranks, and stay so to the last bit.
    norms = [norm for norm in _batchnorms(network) if norm.training]
    local = [norm for norm in norms if not isinstance(norm, GlobalBatchNorm | nn.SyncBatchNorm)]
    buffers = [buffer for norm in local for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    if world_size() == 1 or not buffers:
        return
    means = all_reduce(torch.cat(buffers)) / world_size()
    for buffer, mean in zip(buffers, means.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """AdaBN (Li et al. 2016): replace every BatchNorm's running statistics by their average over `batches`.

    `network` is called once on each batch of images; parameters stay as they are. With `sync` and `group` BatchNorm
    every rank must give the same number of batches.
    """
    before = [(norm, norm.momentum, norm.training) for norm in _batchnorms(network)]
    for norm, *_ in before:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for a cumulative average
        norm.train()
    for images in batches:
        network(images)
    for norm, momentum, training in before:
        norm.momentum = momentum
        norm.train(training)
