"""Where a run is kept: a local folder or object storage, who may write to it, its checkpoints."""
