"""Backbone, embedding and heads; BatchNorm and dropout that do not depend on the number of ranks."""

from ecn_dist.models.backbones import Backbone
from ecn_dist.models.batchnorm import (
    average_local_statistics,
    check_statistics,
    convert_batchnorm,
    reestimate_batchnorm,
)
from ecn_dist.models.dropout import GlobalDropout, mix_seed
from ecn_dist.models.features import autocast, normalized_features
from ecn_dist.models.momentum import MomentumEncoder
from ecn_dist.models.pooling import GeM, Neck
from ecn_dist.models.published import load_published_memory
from ecn_dist.models.weights import export_weights, load_backbone, load_weights

__all__ = [
    "Backbone",
    "GeM",
    "GlobalDropout",
    "MomentumEncoder",
    "Neck",
    "autocast",
    "average_local_statistics",
    "check_statistics",
    "convert_batchnorm",
    "export_weights",
    "load_backbone",
    "load_published_memory",
    "load_weights",
    "mix_seed",
    "normalized_features",
    "reestimate_batchnorm",
]
