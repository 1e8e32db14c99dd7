"""Which model is this? A name for a backbone's weights, so that features of different models are never compared."""

import hashlib

import torch

from ecn_dist.models.backbones import Backbone

_BATCH_COUNT = "num_batches_tracked"  # bookkeeping that changes no feature


def fingerprint_backbone(backbone: Backbone, height: int, width: int) -> str:
    """SHA-256 of the network's name and options, the size of its input and all its weights, rounded to float32.

    The same for a run, its export and a checkpoint of the same step, on any device.
    """
    stride = "" if backbone.last_stride == 2 else f" last stride {backbone.last_stride}"  # no weight tells of it
    own = f" mean {backbone.mean} std {backbone.std}" if backbone.has_own_normalisation else ""
    digest = hashlib.sha256(f"{backbone.arch} {height}x{width}{stride}{own}".encode())
    for name, tensor in sorted(backbone.body.state_dict().items()):
        if not name.endswith(_BATCH_COUNT):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(values.numpy().data)
    return digest.hexdigest()
