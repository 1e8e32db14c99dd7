"""Pseudo-labels: sparse k-reciprocal neighbourhoods, Jaccard graph and DBSCAN, on all ranks."""

from ecn_dist.clustering.clusters import Clusters, find_clusters, jaccard_similarities

__all__ = ["Clusters", "find_clusters", "jaccard_similarities"]
