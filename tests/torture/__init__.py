"""Interrupting runs at every moment, and proving that nothing is lost."""
