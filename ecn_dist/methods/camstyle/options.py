"""The options of `method: camstyle`. Imports no torch."""

from dataclasses import dataclass

from ecn_dist.methods.options import BatchSize, Fraction


@dataclass(frozen=True)
class CamStyleOptions:
    """of method camstyle"""

    copies: BatchSize = 48
    """labelled pictures, each in the style of a random other camera, in a step; a multiple of data.streams"""
    smoothing: Fraction = 0.1
    """share of a copy's target that is spread evenly over all identities"""
