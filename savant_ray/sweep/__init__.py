"""Hyperparameter search: runs with other settings each, under Ray Tune."""
