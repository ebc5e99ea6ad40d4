"""Interrupts runs in every phase of training and checks that nothing is lost."""
