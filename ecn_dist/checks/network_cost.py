"""What one training step of a network costs, measured on torch's meta device: shapes alone, no memory, no arithmetic.

Shape letters: b images of a domain on a rank, D embedding dimension, P source identities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ecn_dist.config import Config
from ecn_dist.models import Backbone, ReIDNetwork

META = torch.device("meta")


@dataclass(frozen=True)
class NetworkCost:
    """Counts of elements (not bytes), and floating point operations, of a step with `b` images of each domain."""

    parameters: int
    trained_parameters: int
    buffers: int  # BatchNorm statistics
    buffer_bytes: int  # their integer counters included
    activations: int  # kept for the backward pass, both domains
    batchnorm_channels: tuple[int, ...]  # of every BatchNorm that trains, in the order of the forward pass
    flops: int  # forward and backward, both domains
    source_flops: int  # of a source-only step


def meta_network(config: Config, num_identities: int) -> ReIDNetwork:
    """The network of `config` on the meta device, without weights.

    Raises `UserError` for an unknown network, an input size it does not take, and too many frozen stages.
    """
    model = config.model
    with META:
        network = ReIDNetwork(
            Backbone(model.arch, config.data.height, config.data.width),
            embedding_dim=model.embedding_dim,
            num_identities=num_identities,
            dropout=0.0,  # a mask is drawn by a generator, which the meta device has not; see `measure`
        )
    network.backbone.freeze(model.frozen_stages, model.shortcut_batchnorm_trains)
    return network.train()


def measure(config: Config, num_identities: int, batch: int) -> NetworkCost:
    """The cost of a step with `batch` images of each domain on a rank."""
    network = meta_network(config, num_identities)
    images = torch.empty(2, batch, 3, config.data.height, config.data.width, device=META)
    own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later one gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as both:
        logits_bP, features_bD = network(images[0], images[1], 0)
        assert features_bD is not None
        (logits_bP.sum() + features_bD.sum()).backward()
    with FlopCounterMode(display=False) as source_only:
        network(images[0], None, 0)[0].sum().backward()
    dropout_masks = 2 * batch * config.model.embedding_dim if config.model.dropout else 0
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        trained_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        buffers=sum(b.numel() for b in network.buffers()),
        buffer_bytes=sum(b.numel() * b.element_size() for b in network.buffers()),
        activations=sum(storage.nbytes() for storage in kept.values()) // images.element_size() + dropout_masks,
        batchnorm_channels=tuple(norm.num_features for norm in _training_batchnorms(network)),
        flops=both.get_total_flops(),
        source_flops=source_only.get_total_flops(),
    )


def _training_batchnorms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
