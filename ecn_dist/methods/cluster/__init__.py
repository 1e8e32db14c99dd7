"""Cluster-Contrast with camera proxies: pseudo-labels, and a memory of cluster means (Dai et al. 2022)."""
