"""The straightforward baseline and the measurements against it; only their command imports them."""
