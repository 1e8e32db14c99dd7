"""The options of `method: fmcl`. Imports no torch."""

from dataclasses import dataclass

from ecn_dist.methods.options import Fraction, Natural, NotNegative


@dataclass(frozen=True)
class FMCLOptions:
    """of method fmcl"""

    soft_weight: NotNegative = 1.0
    """of the cross entropy between the source logits of network and momentum encoder on target pictures"""
    first_momentum: Fraction = 0.01
    """a of the momentum encoder at first (a of its own weights stays at a step): nearly a copy of the network"""
    momentum: Fraction = 0.999
    """a of the momentum encoder from fmcl.momentum_from_epoch on"""
    momentum_from_epoch: Natural = 26
    """first epoch with fmcl.momentum"""
