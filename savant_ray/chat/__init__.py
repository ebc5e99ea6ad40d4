"""A conversation with the model of a checkpoint in the terminal."""
