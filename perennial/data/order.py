"""The order in which a corpus is gone through: draw k of a source -> the window of tokens that it is. Pure arithmetic.

A split of n full rows ("windows") is gone through in epochs; each epoch is its own permutation of [0, n), computed for
any position without a table, so that a loader's whole state is a number and nothing is ever skipped over to resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perennial.core.seeds import derive

_ROUNDS = 8
"""Four are enough in theory (Luby and Rackoff); small domains need a few more to look uniform."""
_GOLDEN = 0x9E3779B97F4A7C15
_ONE = np.uint64(1)


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit.

    The finalizer of SplitMix64. Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
    OOPSLA 2014, figure 15 (constants of David Stafford's variant 13).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: ArrayLike, size: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index of [0, size) goes under the permutation that `key` chooses (one key, or one per index).

    A Feistel network over the b bits of size - 1, halves of b // 2 and b - b // 2 bits, whose round function is
    `scramble`; a result outside the domain is permuted again until it falls inside ("cycle walking", on average less
    than twice, because 2^b < 2 size).

    Source: Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J.
    Comput. 17(2); Black and Rogaway 2002, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 4 and 5.
    Limits: not for secrets; for a handful of indices only near-uniform over all orders.
    """
    result = np.array(indices, dtype=np.uint64, ndmin=1)
    if size <= 1:
        return np.zeros(len(result), np.int64)
    keys = np.broadcast_to(np.asarray(key, np.uint64), result.shape)
    bits = (size - 1).bit_length()
    pending = np.arange(len(result))
    while len(pending):
        walked = _feistel(result[pending], keys[pending], bits)
        result[pending] = walked
        pending = pending[walked >= size]
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    low, high = values & ((_ONE << low_bits) - _ONE), values >> low_bits
    for step in range(_ROUNDS):
        round_key = keys + np.uint64(_GOLDEN * (step + 1) % 2**64)
        if step % 2:
            low = low ^ _top_bits(scramble(high ^ round_key), low_bits)
        else:
            high = high ^ _top_bits(scramble(low ^ round_key), high_bits)
    return (high << low_bits) | low


def _top_bits(values: NDArray[np.uint64], count: np.uint64) -> NDArray[np.uint64]:
    # In two shifts: the low half of a 1-bit number has no bits, and shifting by 64 is undefined.
    return (values >> np.uint64(1)) >> (np.uint64(63) - count)


def keys_of(epochs: NDArray[np.int64], key: Callable[[int], int]) -> NDArray[np.uint64]:
    """The key of each epoch in `epochs`; `key` is asked once per distinct epoch."""
    distinct, inverse = np.unique(epochs, return_inverse=True)
    return np.array([key(int(epoch)) for epoch in distinct], np.uint64)[inverse]


@dataclass(frozen=True)
class Stretches:
    """Parts of a split's stream that rows are made of, sorted by row and column; arrays of one length.

    A row that is a window of the split is one stretch; others are several, end to end.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    start: NDArray[np.int64]
    """First target token in the stream."""
    length: NDArray[np.int64]


@dataclass(frozen=True)
class FreshOrder:
    """Every window of a split once per epoch, each epoch in its own order."""

    fingerprint: str
    seed: int
    num_rows: int
    """Windows per epoch."""
    sequence_length: int

    def windows(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window that each draw (0 is the first since the seed was chosen) is."""
        epochs, indices = np.divmod(draws, self.num_rows)
        keys = keys_of(epochs, lambda epoch: derive(self.seed, self.fingerprint, epoch))
        return permute(indices, self.num_rows, keys)

    def stretches(self, draws: NDArray[np.int64]) -> Stretches:
        """Row i is the window of draw i."""
        length = np.full(len(draws), self.sequence_length)
        rows = np.arange(len(draws))
        return Stretches(rows, np.zeros_like(rows), self.windows(draws) * self.sequence_length, length)


def concatenate(parts: list[tuple[NDArray[Any], Stretches]]) -> tuple[Stretches, NDArray[np.int64]]:
    """Stretches of several sources in one, and the number of each one's source.

    Part i is (rows, stretches): row j of its stretches is row rows[j] of the result.
    """
    source = np.concatenate([np.full(len(s.row), i) for i, (_, s) in enumerate(parts)])
    row = np.concatenate([rows[s.row] for rows, s in parts])
    column, start, length = (
        np.concatenate([getattr(s, name) for _, s in parts]) for name in ("column", "start", "length")
    )
    by_row = np.argsort(row, kind="stable")
    return Stretches(row[by_row], column[by_row], start[by_row], length[by_row]), source[by_row]
