"""A setting's way in: sources, YAML and what is wrong, in the user's words. The settings are in `config.py`."""
