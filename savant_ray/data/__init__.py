"""Training data: reading text, tokenizing and packing it into a token cache, and the global order of the sequences."""
