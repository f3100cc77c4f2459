"""How a CPU cuts causal attention into blocks of queries: what `attention` does and `cost` counts."""

from __future__ import annotations

BLOCK = 128
"""Positions per block: small blocks skip more of the future, large ones multiply faster."""
KEEP_UP_TO = 512
"""Longest row whose attention weights are kept for the backward pass; for longer ones they are computed again."""


def blocks(length: int) -> list[tuple[int, int]]:
    """First position and end of each block of a row; a block's queries look at all keys before its end."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def keeps_weights(length: int) -> bool:
    """Whether the attention weights of a row of this length are kept for the backward pass."""
    return length <= KEEP_UP_TO


def num_scores(length: int) -> int:
    """Scores computed per row and head; (T^2 + T BLOCK) / 2 when the blocks fill the row."""
    return sum((stop - start) * stop for start, stop in blocks(length))
