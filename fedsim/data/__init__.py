"""Data sets, federated splits and modality heterogeneity."""
