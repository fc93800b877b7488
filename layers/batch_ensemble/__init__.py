"""BatchEnsemble: an ensemble that shares one kernel (Wen et al., 2020)."""
