"""Reading and checking of settings: YAML, environment and command line. The settings themselves are in `config.py`."""
