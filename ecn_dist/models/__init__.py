"""Backbone, embedding and heads; BatchNorm and dropout that do not depend on the number of ranks."""

# ruff: noqa: F401 - what is imported here is what others use

from ecn_dist.models.backbones import Backbone
from ecn_dist.models.batchnorm import (
    average_local_statistics,
    check_statistics,
    convert_batchnorm,
    reestimate_batchnorm,
)
from ecn_dist.models.features import MomentumEncoder, autocast, fingerprint_backbone, normalized_features
from ecn_dist.models.foreign import load_published_memory
from ecn_dist.models.layers import GlobalDropout, mix_seed
from ecn_dist.models.weights import export_weights, load_backbone, load_weights, weights_file
