"""Rows divided among the ranks: the one pass over them, the losses on it, the update."""

from ecn_dist.memory.batch import GatheredBatch
from ecn_dist.memory.exemplar_memory import ExemplarMemory

__all__ = ["ExemplarMemory", "GatheredBatch"]
