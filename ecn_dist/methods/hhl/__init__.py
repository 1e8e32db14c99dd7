"""HHL: hetero- and homogeneously learnt triplets (Zhong et al., ECCV 2018)."""
