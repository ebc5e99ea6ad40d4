"""Properties that hold for any input: tested with a few hundred cases by pytest, with any number by `make fuzz`."""
