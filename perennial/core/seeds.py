"""Seeds by name: every random choice has its own 64-bit seed, derived from the run's seed and what it is for."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, stable across machines and versions."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
