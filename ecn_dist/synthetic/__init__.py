"""Synthetic domains: procedurally drawn pedestrians in place of pictures of people, written as real data sets are."""

from ecn_dist.synthetic.folder import DomainSize, pids_of, write_domain
from ecn_dist.synthetic.scene import Studio
from ecn_dist.synthetic.spec import PRESETS, SOURCE, TARGET

__all__ = ["PRESETS", "SOURCE", "TARGET", "DomainSize", "Studio", "pids_of", "write_domain"]
