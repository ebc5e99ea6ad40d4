"""Optimizers, the learning-rate schedule and the gradient buffer."""
