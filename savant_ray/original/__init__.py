"""Checkpoint files of the original program: converted into checkpoints of ours, and written from them."""
