"""The straightforward baseline and the measurements against it; nothing imports it."""
