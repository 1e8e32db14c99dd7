"""The options of `method: cluster`. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Any

from ecn_dist.errors import UserError
from ecn_dist.methods.options import Count, Fraction, NotNegative, Range


@dataclass(frozen=True)
class ClusterOptions:
    """of method cluster"""

    eps: Annotated[float, Range(above=0, below=1)] = 0.6
    """Jaccard distance up to which pictures are near; 0.4 to 0.5 for Market-1501, 0.6 to 0.7 for MSMT17"""
    k1: Count = 30
    """nearest pictures whose mutual ones make a neighbourhood (not with camera_aware)"""
    k2: Count = 6
    """nearest pictures whose neighbourhoods are averaged (not with camera_aware)"""
    min_samples: Count = 4
    """near pictures, itself among them, that make a picture the core of a cluster"""
    camera_aware: bool = False
    """neighbourhoods within a camera and across cameras apart (CA-Jaccard)"""
    k1_intra: Count = 5
    """with camera_aware: nearest pictures of the same camera, beside the picture itself"""
    k1_inter: Count = 20
    """with camera_aware: nearest pictures of the other cameras; less where people have few pictures"""
    camera_weight: NotNegative = 0.0
    """of the loss on camera proxies; 0 turns it off, 0.5 is usual"""
    source_weight: NotNegative = 0.0
    """of the identity loss on a labelled source; 0: the target alone"""
    momentum: Fraction = 0.1
    """m of a cluster's row at an update"""
    proxy_momentum: Fraction = 0.2
    """m of a camera proxy at an update"""
    hardest: bool = False
    """update a cluster once a step, with its least similar picture"""
    instances: Count = 16
    """K pictures of each cluster in a batch; P = global_batch_size / K clusters"""
    steps_per_epoch: Count = 200
    """steps between two clusterings"""

    def check(self, section: str) -> None:
        if self.k2 > self.k1:
            raise UserError(f"{section}.k2: {self.k2} must be at most {section}.k1 ({self.k1})")

    def search_arguments(self, *, first: bool = False) -> dict[str, Any]:
        """Arguments of `find_clusters`; `first`: of a first epoch, whose features are poor."""
        k2_intra, k2_inter = (3, 3) if first else (2, 4)
        names = ("k1", "k2", "eps", "min_samples", "k1_intra", "k1_inter")
        averaged = {"k2_intra": min(k2_intra, self.k1_intra + 1), "k2_inter": min(k2_inter, self.k1_inter)}
        return {name: getattr(self, name) for name in names} | averaged
