"""Storage of a run: a local folder or object storage, the lock that protects it, and its checkpoints."""
