"""Backbone, embedding and heads; BatchNorm and dropout that do not depend on the number of ranks."""

from ecn_dist.models.backbones import Backbone
from ecn_dist.models.batchnorm import average_local_statistics, convert_batchnorm, reestimate_batchnorm
from ecn_dist.models.dropout import GlobalDropout
from ecn_dist.models.features import autocast, normalized_features
from ecn_dist.models.published import load_published_memory
from ecn_dist.models.weights import export_weights, load_backbone, load_weights

__all__ = [
    "Backbone",
    "GlobalDropout",
    "autocast",
    "average_local_statistics",
    "convert_batchnorm",
    "export_weights",
    "load_backbone",
    "load_published_memory",
    "load_weights",
    "normalized_features",
    "reestimate_batchnorm",
]
