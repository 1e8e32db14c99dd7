"""ECN: exemplar memory with exemplar-, camera- and neighbourhood-invariance (Zhong et al., CVPR 2019)."""
