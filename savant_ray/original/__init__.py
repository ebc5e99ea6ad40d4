"""Checkpoint files of the original script: converted into checkpoints of ours, and written from them."""
