"""ECN: exemplar memory with exemplar-, camera- and neighbourhood-invariance (Zhong et al., CVPR 2019)."""

from ecn_dist.methods.ecn.method import ECN

__all__ = ["ECN"]
