"""The mathematics of the method: exemplar memory, neighbours, losses, schedules."""

from ecn_dist.ecn.memory import ExemplarMemory, GatheredBatch

__all__ = ["ExemplarMemory", "GatheredBatch"]
