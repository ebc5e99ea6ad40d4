"""Benchmarks against a straightforward baseline; imported only by `savant benchmark`."""
