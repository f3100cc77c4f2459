"""Byte-pair merging that goes on from words already cut into tokens: counts and places of pairs, kept up to date.

The distinct words lie one after the other in flat arrays, linked to their neighbours, so that joining a pair changes
its occurrences, and nothing else, in whole-array steps: thousands of merges over the words of 100 MB of text take
seconds.
Source: Sennrich, Haddow, Birch 2016, Neural Machine Translation of Rare Words with Subword Units (arXiv 1508.07909),
    section 3.2. Differs: words start from the cut of an existing tokenizer instead of from characters.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SHIFT = 32
_RIGHT = (1 << _SHIFT) - 1
_NONE = -1


class Words(NamedTuple):
    """Distinct words as token ids, one after the other, with how often each occurs."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def counted(cls, counter: Counter[bytes]) -> Words:
        """From counts of the words' ids as int32 bytes, in an order that does not depend on how they were met."""
        ordered = sorted(counter)
        tokens = np.frombuffer(b"".join(ordered), np.int32)
        lengths = np.array([len(word) // 4 for word in ordered], np.int64)
        return cls(tokens, lengths, np.array([counter[word] for word in ordered], np.int64))


def pair_key(left: int, right: int) -> int:
    """Two ids below 2^31 as one number."""
    return left << _SHIFT | right


def pair_of(key: int) -> tuple[int, int]:
    """The ids of `pair_key`."""
    return key >> _SHIFT, key & _RIGHT


def pair_keys(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The key of every two neighbours in a row of ids."""
    keys: NDArray[np.int64] = tokens[:-1] << _SHIFT | tokens[1:]
    return keys


class Pairs:
    """All pairs of neighbouring tokens in the words, with their counts, while pairs are joined one after the other."""

    def __init__(self, words: Words) -> None:
        num_tokens = len(words.tokens)
        ends = np.cumsum(words.lengths)
        # Four bytes a number: where words are not separated, these are as long as the text.
        self._token = words.tokens.copy()
        self._weight = np.repeat(words.counts, words.lengths)
        self._next = np.arange(1, num_tokens + 1, dtype=np.int32)
        self._next[ends - 1] = _NONE
        self._previous = np.arange(-1, num_tokens - 1, dtype=np.int32)
        self._previous[ends - words.lengths] = _NONE
        places = np.flatnonzero(self._next != _NONE).astype(np.int32)
        keys = self._keys(places)
        order = np.argsort(keys, kind="stable")
        self._sorted_places = places[order]
        distinct, starts = np.unique(keys[order], return_index=True)
        totals = np.add.reduceat(self._weight[self._sorted_places], starts) if len(starts) else starts
        stops = [*starts[1:].tolist(), len(places)]
        self.counts: dict[int, int] = dict(zip(distinct.tolist(), totals.tolist(), strict=True))
        """How often each pair occurs in the text, by its key."""
        self._slices = dict(zip(distinct.tolist(), zip(starts.tolist(), stops, strict=True), strict=True))
        self._later: dict[int, list[NDArray[np.int32]]] = {}

    def _keys(self, places: NDArray[np.int32]) -> NDArray[np.int64]:
        keys: NDArray[np.int64] = self._token[places].astype(np.int64) << _SHIFT | self._token[self._next[places]]
        return keys

    def join(self, left: int, right: int, product: int) -> list[int]:
        """Replaces every occurrence of the pair, leftmost first; returns the keys of the pairs that `product` forms."""
        first = self._occurrences(left, right)
        second = self._next[first]
        touched = np.concatenate([self._previous[first], first, second[self._next[second] != _NONE]])
        self._count(np.unique(touched[touched != _NONE]), -1)
        behind = self._next[second]
        self._token[first], self._token[second] = product, _NONE
        self._next[first] = behind
        has_next = behind != _NONE
        self._previous[behind[has_next]] = first[has_next]
        formed = np.concatenate([self._previous[first], first[has_next]])
        return self._count(np.unique(formed[formed != _NONE]), 1)

    def _occurrences(self, left: int, right: int) -> NDArray[np.int32]:
        """Where the pair stands now (the place of its left token), without overlaps, in order."""
        key = pair_key(left, right)
        start, stop = self._slices.pop(key, (0, 0))
        places = np.unique(np.concatenate([self._sorted_places[start:stop], *self._later.pop(key, [])]))
        places = places[(self._token[places] == left) & (self._next[places] != _NONE)]
        places = places[self._token[self._next[places]] == right]
        return self._leftmost(places) if left == right else places

    def _leftmost(self, places: NDArray[np.int32]) -> NDArray[np.int32]:
        """Of occurrences that share a token (a a a), every other one from the left, as BPE joins them."""
        taken, used = [], _NONE
        for place, following in zip(places.tolist(), self._next[places].tolist(), strict=True):
            if place != used:
                taken.append(place)
                used = following
        return np.array(taken, np.int32)

    def _count(self, places: NDArray[np.int32], sign: int) -> list[int]:
        """Adds the pairs at these places to the counts, or takes them away; returns their keys."""
        if not len(places):
            return []
        keys = self._keys(places)
        order = np.argsort(keys, kind="stable")
        distinct, starts = np.unique(keys[order], return_index=True)
        totals = np.add.reduceat(self._weight[places[order]], starts)
        groups = np.split(places[order], starts[1:]) if sign > 0 else [places] * len(starts)
        found: list[int] = distinct.tolist()
        for key, total, group in zip(found, totals.tolist(), groups, strict=True):
            self.counts[key] = self.counts.get(key, 0) + sign * total
            if sign > 0:
                self._later.setdefault(key, []).append(group)
            elif not self.counts[key]:
                del self.counts[key]
        return found


class Queue:
    """Candidates by how much they save, the largest first; equal ones by their number, so that the order is fixed."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def push(self, candidate: int, saving: int) -> None:
        """Adds a candidate, or a new saving of one that is there already."""
        heapq.heappush(self._heap, (-saving, candidate))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(candidate, saving as pushed), taken out one by one; what is pushed meanwhile comes in its turn."""
        while self._heap:
            saving, candidate = heapq.heappop(self._heap)
            yield candidate, -saving
