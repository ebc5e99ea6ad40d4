"""The loop, a step, state, checkpoint content, memory cap. No Ray: it runs on plain torch.distributed or alone."""
