"""Randomness as a function of (seed, step, purpose), never of rank or of a global generator."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed of its own for each purpose and step of a run."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
