"""One attempt at a run, in the driver process: checks, data, Ray Train, signals, exit code."""
