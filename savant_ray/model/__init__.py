"""Tensors in, tensors out: the Savant model, its attention, its loss and its cache."""
