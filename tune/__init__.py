"""Sweeps with Ray Tune: search spaces over config paths, trials that are whole federations, and their best config."""
