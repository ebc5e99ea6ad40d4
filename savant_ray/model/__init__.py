"""The Savant model: transformer, attention, loss and key-value cache."""
