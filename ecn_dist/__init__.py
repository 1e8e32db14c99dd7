"""Distributed training of domain adaptive person re-identification with an exemplar memory (ECN, CVPR 2019)."""

__version__ = "0.1.0"
