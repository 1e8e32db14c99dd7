"""Rows divided among the ranks: the one pass over them, the losses on it, the update."""

from ecn_dist.memory.exemplar_memory import ExemplarMemory
from ecn_dist.memory.gathered import GatheredBatch

__all__ = ["ExemplarMemory", "GatheredBatch"]
