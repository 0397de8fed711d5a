"""Attacks on privacy, to measure what a federation leaks (docs/privacy.md); no run uses them."""
