"""What one training step of a network costs, measured on torch's meta device: shapes alone, no memory, no arithmetic.

Shape letters: b images of a domain on a rank, D embedding dimension, P source identities.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ecn_dist.config import Config
from ecn_dist.methods.base import Method, Step
from ecn_dist.training.building import Domains, build_method

META = torch.device("meta")


@dataclass(frozen=True)
class NetworkCost:
    """Counts of elements (not bytes), and floating point operations, of a step with `b` images of each domain."""

    parameters: int
    trained_parameters: int
    buffer_bytes: int  # BatchNorm statistics, their integer counters included
    activations: int  # kept for the backward pass, both domains
    batchnorm_channels: tuple[int, ...]  # of every BatchNorm that trains, in the order of the forward pass
    flops: int  # forward and backward, both domains
    source_flops: int  # of a source-only step


def meta_method(config: Config, domains: Domains) -> Method:
    """The method of `config` on the meta device, without weights.

    Raises `UserError` for an unknown network, an input size it does not take, and too many frozen stages.
    """
    # A dropout's mask is drawn by a generator, which the meta device has not; `measure` counts it.
    model = dataclasses.replace(config.model, dropout=0.0)
    return build_method(dataclasses.replace(config, model=model), domains, META).train()


def measure(config: Config, domains: Domains, world_size: int) -> NetworkCost:
    """The cost of a step on one of `world_size` ranks."""
    network = meta_method(config, domains)
    height, width = config.data.height, config.data.width
    images = {
        feed.name: torch.empty(feed.batch_size // world_size, 3, height, width, device=META) for feed in network.feeds()
    }
    own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later one gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as both:
        torch.stack([output.sum() for output in network(images, Step(0, 0, False)).values()]).sum().backward()
    with FlopCounterMode(display=False) as source_only:
        if config.optim.source_only_epochs:
            network(images, Step(0, -1, True))["logits"].sum().backward()
    num_images = sum(map(len, images.values()))
    dropout_masks = num_images * config.model.embedding_dim if config.model.dropout else 0
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        trained_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        buffer_bytes=sum(b.numel() * b.element_size() for b in network.buffers()),
        activations=sum(storage.nbytes() for storage in kept.values()) // torch.empty(0).element_size() + dropout_masks,
        batchnorm_channels=tuple(norm.num_features for norm in _training_batchnorms(network)),
        flops=both.get_total_flops(),
        source_flops=source_only.get_total_flops(),
    )


def _training_batchnorms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
