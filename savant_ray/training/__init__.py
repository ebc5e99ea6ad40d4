"""Training without Ray, on one process or on `torch.distributed`: loop, step, state, device, checkpoint, profile."""
