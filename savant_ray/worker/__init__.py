"""What each Ray Train worker process runs: the training function, saving, resuming, metrics."""
