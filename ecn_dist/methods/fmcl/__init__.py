"""FMCL: ECN with a momentum encoder's features as positives and as the memory's rows."""
