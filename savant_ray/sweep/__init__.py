"""Hyperparameter search under Ray Tune: one run per combination of settings."""
