"""The options of `method: hhl`. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from ecn_dist.methods.options import BatchSize, NotNegative, Range


@dataclass(frozen=True)
class HHLOptions:
    """of method hhl"""

    triplet_weight: NotNegative = 0.5
    """of the triplet loss beside the source's identity loss; 0 is the control without it"""
    margin: NotNegative = 0.3
    """by which the farthest positive is to be nearer than the nearest negative, in Euclidean distance"""
    triplet_dim: Annotated[int, Range(least=1, most=2**16)] = 128
    """length of the triplet loss's embedding"""
    source_identities: BatchSize = 8
    """P source identities in a batch of triplets; P times hhl.instances is a multiple of data.streams"""
    instances: BatchSize = 8
    """K pictures of each source identity"""
    target_pictures: BatchSize = 16
    """target pictures in a batch of triplets, each with all its style copies; a multiple of data.streams"""
