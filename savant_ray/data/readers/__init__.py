"""Readers of the formats other than JSON lines; each yields the records of a part of a file."""
