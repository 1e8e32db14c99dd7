"""The mathematics of the method: exemplar memory, neighbours, losses, schedules."""

from ecn_dist.ecn.gathered import GatheredBatch
from ecn_dist.ecn.memory import ExemplarMemory

__all__ = ["ExemplarMemory", "GatheredBatch"]
