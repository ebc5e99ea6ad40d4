"""The code of a Ray Train worker process: training function, input, saving, resuming, metrics."""
