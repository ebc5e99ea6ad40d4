"""Properties that hold for any input: a few hundred cases in the quick tests, as many as wanted with `make fuzz`."""
