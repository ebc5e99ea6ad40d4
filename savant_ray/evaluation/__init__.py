"""Evaluation: loss on held-out text, logic problems, generated samples; during training and of a checkpoint."""
