"""CamStyle: a labelled data set with its style copies as more pictures (Zhong et al., CVPR 2018)."""
