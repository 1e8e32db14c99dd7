"""Synthetic domains: procedurally drawn pedestrians in place of pictures of people, written as real data sets are."""

from ecn_dist.data.synthetic.folder import pids_of, write_domain
from ecn_dist.data.synthetic.scene import Studio
from ecn_dist.data.synthetic.spec import PRESETS, SOURCE, TARGET, CameraSpec, DomainSpec, PeopleSpec, PlaceSpec

__all__ = [
    "PRESETS",
    "SOURCE",
    "TARGET",
    "CameraSpec",
    "DomainSpec",
    "PeopleSpec",
    "PlaceSpec",
    "Studio",
    "pids_of",
    "write_domain",
]
