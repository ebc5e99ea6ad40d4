"""Seeds as a function of (run seed, step, purpose), independent of ranks and of global generators."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """Return a 63-bit seed that is different for each purpose and step of a run."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
