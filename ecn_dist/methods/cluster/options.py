"""The options of `method: cluster`. Imports no torch."""

from dataclasses import dataclass

from ecn_dist.errors import UserError
from ecn_dist.methods.options import check_range


@dataclass(frozen=True)
class ClusterOptions:
    eps: float = 0.6
    """Jaccard distance up to which pictures are near; 0.4 to 0.5 for Market-1501, 0.6 to 0.7 for MSMT17"""
    k1: int = 30
    """nearest pictures whose mutual ones make a neighbourhood (not with camera_aware)"""
    k2: int = 6
    """nearest pictures whose neighbourhoods are averaged (not with camera_aware)"""
    min_samples: int = 4
    """near pictures, itself among them, that make a picture the core of a cluster"""
    camera_aware: bool = False
    """neighbourhoods within a camera and across cameras apart (CA-Jaccard)"""
    k1_intra: int = 5
    """with camera_aware: nearest pictures of the same camera, beside the picture itself"""
    k1_inter: int = 20
    """with camera_aware: nearest pictures of the other cameras; less where people have few pictures"""
    camera_weight: float = 0.0
    """of the loss on camera proxies; 0 turns it off, 0.5 is usual"""
    source_weight: float = 0.0
    """of the identity loss on a labelled source; 0: the target alone"""
    momentum: float = 0.1
    """m of a cluster's row at an update"""
    proxy_momentum: float = 0.2
    """m of a camera proxy at an update"""
    hardest: bool = False
    """update a cluster once a step, with its least similar picture"""
    instances: int = 16
    """K pictures of each cluster in a batch; P = global_batch_size / K clusters"""
    steps_per_epoch: int = 200
    """steps between two clusterings"""

    def check(self, section: str) -> None:
        check_range(f"{section}.eps", self.eps, above=0, below=1)
        for name in ("k1", "k2", "k1_intra", "k1_inter", "min_samples", "instances", "steps_per_epoch"):
            check_range(f"{section}.{name}", getattr(self, name), least=1)
        for name in ("camera_weight", "source_weight"):
            check_range(f"{section}.{name}", getattr(self, name), least=0)
        for name in ("momentum", "proxy_momentum"):
            check_range(f"{section}.{name}", getattr(self, name), least=0, below=1)
        if self.k2 > self.k1:
            raise UserError(f"{section}.k2: {self.k2} must be at most {section}.k1 ({self.k1})")
