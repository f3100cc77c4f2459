"""Which source each row of a stage comes from: shares kept exactly per block of rows, spread evenly inside it.

Row g of a stage is a pure function of (corpus fingerprints, weights, seeds, g). A block of 10,000 rows holds a fixed
number of rows of each source (largest remainder of the weights), so that the rows drawn from a source before any block
are a multiplication; inside a block the sources are interleaved at random but evenly, so that every stretch of rows has
close to its share. A stage that begins where another stopped is told how many rows of each source were drawn before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from perennial.core.errors import UserError
from perennial.core.seeds import derive
from perennial.data.corpus import Corpus, Split
from perennial.data.order import FreshOrder, Stretches, concatenate, scramble
from perennial.data.replay import FRESH, REPLAY, ReplayOrder, SourceSpec

BLOCK_ROWS = 10_000
_BLOCKS_KEPT = 4
"""Blocks whose order is remembered; planning a block costs some milliseconds, remembering it 1 MB."""


def apportion(weights: Sequence[float], rows: int) -> NDArray[np.int64]:
    """Whole numbers of rows that add up to `rows`, closest to the shares of `weights`, at least 1 for each.

    The method of largest remainders (Hamilton's); on equal remainders the earlier source comes first.
    """
    assert len(weights) <= rows, f"{len(weights)} sources do not fit in {rows} rows"
    shares = np.asarray(weights, np.float64) / np.sum(weights) * rows
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: rows - counts.sum()]] += 1
    for index in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[index] = 1
    return counts


def interleave(counts: NDArray[np.int64], key: int) -> NDArray[np.int64]:
    """The source of each row of a block with `counts` rows of each.

    Row j of the n of a source is put at (j + u) / n with its own random u of [0, 1), then all are sorted: after any
    share f of the block, a source has had f * n rows, give or take a couple.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    jitter = scramble(np.arange(len(source), dtype=np.uint64) + np.uint64(key)) >> np.uint64(11)
    position = (place + jitter * 2.0**-53) / counts[source]
    return source[np.argsort(position, kind="stable")]


@dataclass(frozen=True)
class _Block:
    """The order of one block of rows; row numbers count from its beginning."""

    source: NDArray[np.int64]
    draw: NDArray[np.int64]
    stretches: Stretches
    stretch_source: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of some consecutive rows lie; row numbers in `stretches` count from the first of them."""

    source: NDArray[np.int64]
    """Source index of each row."""
    stretches: Stretches
    stretch_source: NDArray[np.int64]
    """Source index of each stretch."""


class StageOrder:
    """The order of a stage's rows: a pure function of the specs, the corpora's fingerprints, the seed and the row."""

    def __init__(
        self, specs: Sequence[SourceSpec], corpora: Mapping[str, Corpus], *, seed: int, sequence_length: int
    ) -> None:
        """`corpora` by fingerprint. Raises UserError when a corpus is not the one its spec names, or fills no row."""
        _check_specs(specs)
        self.specs = tuple(specs)
        self.sequence_length = sequence_length
        self._seed = seed
        self._orders = [_order_of(spec, _corpus_of(spec, corpora).train, sequence_length) for spec in specs]
        self._counts = apportion([spec.weight for spec in specs], BLOCK_ROWS)
        self._arranged = lru_cache(_BLOCKS_KEPT)(self._arrange)
        self._planned = lru_cache(_BLOCKS_KEPT)(self._plan)

    def available_rows(self, name: str) -> int:
        """Rows that the source has for one epoch."""
        return self._orders[[spec.name for spec in self.specs].index(name)].num_rows

    def consumed(self, row: int) -> dict[str, int]:
        """Rows drawn from each source, by name, in the first `row` rows of the stage."""
        counts = self._consumed(row).tolist()
        return {spec.name: count for spec, count in zip(self.specs, counts, strict=True)}

    def draws(self, start: int, stop: int) -> dict[str, tuple[int, int]]:
        """The draws [first, stop) that rows start to stop take of each source, rows before the stage counted."""
        before, after = self.consumed(start), self.consumed(stop)
        return {s.name: (s.offset_rows + before[s.name], s.offset_rows + after[s.name]) for s in self.specs}

    def sources(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source index, and which draw of it (rows before the stage counted), of the rows from `start` to `stop`."""
        parts = [[array[a:b] for array in self._arranged(block)] for block, a, b in _blocks(start, stop)]
        source, draw = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return source, draw

    def rows(self, start: int, stop: int) -> Rows:
        """Where the tokens of the rows from `start` to `stop` lie."""
        parts = [self._slice(block, first, last) for block, first, last in _blocks(start, stop)]
        if len(parts) == 1:
            return parts[0]
        sizes = [len(part.source) for part in parts]
        shifts = np.cumsum([0, *sizes[:-1]])
        joined = [
            np.concatenate([getattr(part.stretches, name) for part in parts]) for name in ("column", "start", "length")
        ]
        row = np.concatenate([part.stretches.row + shift for part, shift in zip(parts, shifts.tolist(), strict=True)])
        source, stretch_source = (np.concatenate([getattr(p, n) for p in parts]) for n in ("source", "stretch_source"))
        return Rows(source, Stretches(row, *joined), stretch_source)

    def check_repetition(self, rows: int) -> None:
        """Raises UserError when the first `rows` rows would go through a source more often than its cap allows."""
        drawn = self._consumed(rows).tolist()
        problems = [text for index, count in enumerate(drawn) if (text := self._repetition(index, count, rows))]
        if problems:
            raise UserError("\n".join(problems))

    def _repetition(self, index: int, drawn: int, rows: int) -> str | None:
        """What is wrong when a source is asked for `drawn` rows, or None."""
        spec, length, available = self.specs[index], self.sequence_length, self._orders[index].num_rows
        epochs = (spec.offset_rows + drawn) / available
        if epochs <= spec.max_epochs * (1 + 1e-9):
            return None
        before = f", after {spec.offset_rows:,} that were drawn before" if spec.offset_rows else ""
        text = (
            f"source '{spec.name}' has {available:,} rows of {length:,} tokens; {drawn:,} are asked for{before}: "
            f"{epochs:.3g} epochs, the cap is {spec.max_epochs:g} (max_epochs). "
        )
        left = int(spec.max_epochs * available) - spec.offset_rows
        enough = f"raise max_epochs to {math.ceil(epochs * 100) / 100:g}"
        if left <= 0:
            return f"{text}Nothing is left of it: leave it out, or {enough}."
        most = bisect_right(range(rows), left, key=lambda row: int(self._consumed(row)[index])) - 1
        share = math.floor(left / rows * 1e4) / 100
        return (
            f"{text}Lower the stage to at most {most * length:,} tokens, or the source's share to at most {share:g}%, "
            f"or {enough}, or add data."
        )

    def _consumed(self, row: int) -> NDArray[np.int64]:
        block, rest = divmod(row, BLOCK_ROWS)
        counts = self._counts * block
        if rest:
            counts = counts + np.bincount(self._arranged(block)[0][:rest], minlength=len(self.specs))
        return counts

    def _arrange(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        source = interleave(self._counts, derive(self._seed, "block", block))
        draw = np.empty_like(source)
        for index, spec in enumerate(self.specs):
            count = int(self._counts[index])
            draw[source == index] = spec.offset_rows + block * count + np.arange(count)
        return source, draw

    def _plan(self, block: int) -> _Block:
        source, draw = self._arranged(block)
        parts = []
        for index, order in enumerate(self._orders):
            rows = np.flatnonzero(source == index)
            parts.append((rows, order.stretches(draw[rows])))
        return _Block(source, draw, *concatenate(parts))

    def _slice(self, block: int, first: int, last: int) -> Rows:
        plan = self._planned(block)
        of = plan.stretches
        a, b = np.searchsorted(of.row, [first, last]).tolist()
        return Rows(
            plan.source[first:last],
            Stretches(of.row[a:b] - first, of.column[a:b], of.start[a:b], of.length[a:b]),
            plan.stretch_source[a:b],
        )


def _blocks(start: int, stop: int) -> list[tuple[int, int, int]]:
    """(block, first row, row after the last) of the parts of blocks that the rows from `start` to `stop` make up."""
    assert 0 <= start < stop, f"rows {start} to {stop}"
    return [
        (block, max(start - block * BLOCK_ROWS, 0), min(stop - block * BLOCK_ROWS, BLOCK_ROWS))
        for block in range(start // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS + 1)
    ]


def _check_specs(specs: Sequence[SourceSpec]) -> None:
    if not 0 < len(specs) <= BLOCK_ROWS:
        raise UserError(f"a mixture needs between 1 and {BLOCK_ROWS} sources, this one has {len(specs)}")
    names: set[str] = set()
    orders: dict[tuple[str, str, int], str] = {}
    for spec in specs:
        if spec.role not in (FRESH, REPLAY):
            raise UserError(f"source '{spec.name}': role '{spec.role}' must be '{FRESH}' or '{REPLAY}'")
        if not 0 < spec.weight < float("inf"):
            raise UserError(f"source '{spec.name}': weight {spec.weight} must be above 0; leave a source out instead")
        if spec.name in names:
            raise UserError(f"source '{spec.name}' is named twice in one mixture")
        names.add(spec.name)
        twin = orders.setdefault((spec.role, spec.fingerprint, spec.seed), spec.name)
        if twin != spec.name:
            raise UserError(
                f"sources '{twin}' and '{spec.name}' are the same corpus ({spec.fingerprint[:12]}) in the same order, "
                "so every row would come twice; name it once and give it both weights"
            )


def _corpus_of(spec: SourceSpec, corpora: Mapping[str, Corpus]) -> Corpus:
    corpus = corpora.get(spec.fingerprint)
    if corpus is not None and corpus.fingerprint == spec.fingerprint:
        return corpus
    name = spec.name.removeprefix("replay/")
    there = corpus or next((c for c in corpora.values() if str(c.path) == spec.corpus), None)
    found = f"has fingerprint {there.fingerprint[:12]}" if there else "was not opened"
    raise UserError(
        f"source '{spec.name}': the corpus with fingerprint {spec.fingerprint[:12]} is needed, but the one at "
        f"{spec.corpus} {found}. If it was changed or prepared anew, its order is no longer known: bring the unchanged "
        f"one back. If it was moved, say where it lies now with `moved: {{{name}: PATH}}` (`--moved {name}=PATH`)."
    )


def _order_of(spec: SourceSpec, split: Split, sequence_length: int) -> FreshOrder | ReplayOrder:
    order: FreshOrder | ReplayOrder
    if spec.role == FRESH:
        order = FreshOrder(spec.fingerprint, spec.seed, split.num_rows(sequence_length), sequence_length)
        held = f"the corpus at {spec.corpus} has {split.num_tokens:,} training tokens"
    else:
        order = ReplayOrder(spec, split, sequence_length)
        held = f"the ancestors saw {sum(seen.rows * seen.sequence_length for seen in spec.seen):,} tokens of it"
    if order.num_rows == 0:
        raise UserError(
            f"source '{spec.name}': {held}, which do not fill one row of {sequence_length:,}. Leave it out, prepare "
            "more text, or lower batch.sequence_length."
        )
    return order
