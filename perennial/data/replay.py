"""Replay: rows drawn again from what an ancestor was trained on, only what it really saw, in a fresh order.

A lineage records how many rows were drawn from each corpus, with which seed and sequence length. Because order is pure
arithmetic (order.py), that is enough to name the windows seen: the parent's first draws. They are reshuffled with the
child's seed in every replay epoch, and cut into the child's rows. Replay takes its share out of the budget instead of
adding to it ("compute-equivalent"), and divides it in the proportions in which the ancestors consumed their corpora.

Source: Ibrahim, Therien, Gupta, Richter et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large
Language Models", arXiv 2403.08763, section 4.2 (compute-equivalent replay of data seen before).
Differs: the paper reads the old data in its original order; here the order is fresh, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.core.errors import UserError
from perennial.core.seeds import derive
from perennial.data.corpus import Split
from perennial.data.order import FreshOrder, Stretches, keys_of, permute

FRESH = "fresh"
REPLAY = "replay"
MAX_EPOCHS = 4.0
"""Passes over the same tokens up to which repeating is worth almost as much as new data.

Source: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264, section 6."""
_PREFIX = "replay/"

Spans = tuple[tuple[int, int], ...]
"""Ranges [first, stop) of draws."""


@dataclass(frozen=True)
class Seen:
    """What training in one order saw of a corpus: its first `rows` draws, but for those in `skipped`."""

    seed: int
    rows: int
    sequence_length: int
    skipped: Spans = ()
    """Ranges [first, stop) of draws that were not trained on, such as those passed over after a loss spike."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of a stage's mixture: which corpus, its share, its order and where in the order the stage begins."""

    name: str
    """'new' for fresh data of the corpus 'new', 'replay/old' for replayed data of 'old'."""
    corpus: str
    """Path of the prepared corpus."""
    fingerprint: str
    weight: float
    """Share of the stage's rows; the weights of a stage are divided by their sum."""
    role: str
    """'fresh' or 'replay'."""
    seed: int
    """Seed of the order."""
    offset_rows: int = 0
    """Rows of this source drawn before the stage, in the same order."""
    seen: tuple[Seen, ...] = ()
    """Replay only: what the ancestors saw of the corpus, one entry per order they went through."""
    max_epochs: float = MAX_EPOCHS
    """Most passes over the source; asking for more is an error."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `from_json` reads it back."""
        seen = [{**asdict(one), "skipped": [list(span) for span in one.skipped]} for one in self.seen]
        return {**asdict(self), "seen": seen}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SourceSpec:
        """The spec in a resolved stage, or in a lineage, which adds what was drawn (rows, tokens, epochs)."""
        own = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        seen = tuple(
            Seen(one["seed"], one["rows"], one["sequence_length"], tuple((a, b) for a, b in one.get("skipped", ())))
            for one in data.get("seen", ())
        )
        return cls(**{**own, "seen": seen})


@dataclass(frozen=True)
class _Pool:
    """The windows that one order of an ancestor saw in its first epoch, numbered by when it drew them."""

    order: FreshOrder
    firsts: NDArray[np.int64]
    """First draw of each stretch of draws that were trained on."""
    before: NDArray[np.int64]
    """Windows in the stretches before each; the last entry is the number of all."""

    @classmethod
    def of(cls, seen: Seen, split: Split, fingerprint: str) -> _Pool:
        order = FreshOrder(fingerprint, seen.seed, split.num_rows(seen.sequence_length), seen.sequence_length)
        kept = _without([(0, min(seen.rows, order.num_rows))], seen.skipped)
        firsts, stops = (np.array([span[i] for span in kept], np.int64) for i in (0, 1))
        return cls(order, firsts, np.concatenate([[0], np.cumsum(stops - firsts)]))

    @property
    def size(self) -> int:
        return int(self.before[-1])

    def starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the stream the windows with these numbers begin."""
        span = np.searchsorted(self.before, numbers, side="right") - 1
        draws = self.firsts[span] + numbers - self.before[span]
        return self.order.windows(draws) * self.order.sequence_length


class ReplayOrder:
    """Rows of what ancestors saw of a split, in an order of their own; each epoch goes through all of it once.

    Each epoch lays the seen windows of an ancestor's order end to end in a new permutation, with the inputs they had,
    and cuts the rows from that; the tail that fills no row is left out, another one each time. The rows of several such
    orders are then shuffled together.

    Limits: entries of `seen` with different seeds or sequence lengths are not compared. A token that two of them hold
    was seen twice and comes up twice per epoch. Of an order that went around more than once, skipped draws of its first
    epoch stay left out even when a later one saw their windows.
    """

    def __init__(self, spec: SourceSpec, split: Split, sequence_length: int) -> None:
        self._spec = spec
        self._length = sequence_length
        self._pools = [_Pool.of(seen, split, spec.fingerprint) for seen in spec.seen]
        rows = [pool.size * pool.order.sequence_length // sequence_length for pool in self._pools]
        self._before = np.cumsum([0, *rows], dtype=np.int64)
        self.num_rows = int(self._before[-1])
        """Rows per epoch."""

    def stretches(self, draws: NDArray[np.int64]) -> Stretches:
        """Row i is made of the windows, or parts of windows, of draw i."""
        epochs, indices = np.divmod(draws, self.num_rows)
        numbers = permute(indices, self.num_rows, self._keys(epochs, "rows"))
        pools = np.searchsorted(self._before, numbers, side="right") - 1
        parts = []
        for index in np.unique(pools).tolist():
            rows = np.flatnonzero(pools == index)
            parts.append(self._cut(self._pools[index], rows, numbers[rows] - self._before[index], epochs[rows]))
        row, column, start, length = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(row, kind="stable")
        return Stretches(row[order], column[order], start[order], length[order])

    def _cut(
        self, pool: _Pool, rows: NDArray[np.int64], numbers: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Row, column, start and length of the parts of the pool's windows that rows `numbers` are cut from."""
        width, length = pool.order.sequence_length, self._length
        first = numbers * length // width
        count = ((numbers + 1) * length - 1) // width - first + 1
        owner = np.repeat(np.arange(len(numbers)), count)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count - first, count)
        keys = self._keys(epochs, f"windows {pool.order.seed} {width}")[owner]
        begin = np.maximum(place * width, numbers[owner] * length)
        end = np.minimum((place + 1) * width, (numbers[owner] + 1) * length)
        start = pool.starts(permute(place, pool.size, keys)) + begin - place * width
        return rows[owner], begin - numbers[owner] * length, start, end - begin

    def _keys(self, epochs: NDArray[np.int64], purpose: str) -> NDArray[np.uint64]:
        spec = self._spec
        return keys_of(epochs, lambda epoch: derive(spec.seed, REPLAY, purpose, spec.fingerprint, epoch))


@dataclass
class _Consumption:
    """What the ancestors drew from one corpus."""

    name: str
    path: str
    tokens: int = 0
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    """(seed, sequence length) -> draws that were trained on."""

    def add(self, source: Mapping[str, Any], sequence_length: int) -> None:
        self.name, self.path = source["name"].removeprefix(_PREFIX), source["corpus"]
        self.tokens += source["tokens"]
        if source["role"] == FRESH and source["rows"]:
            first = source["offset_rows"]
            trained = _without([(first, first + source["rows"])], source.get("skipped", ()))
            self.drawn.setdefault((source["seed"], sequence_length), []).extend(trained)

    def seen(self) -> tuple[Seen, ...]:
        result = []
        for (seed, sequence_length), spans in self.drawn.items():
            rows = max((stop for _, stop in spans), default=0)
            gaps = tuple(_without([(0, rows)], spans))
            if rows:
                result.append(Seen(seed, rows, sequence_length, gaps))
        return tuple(result)


def replay_sources(
    lineage_stages: list[dict[str, Any]],
    share: float,
    seed: int,
    *,
    moved: Mapping[str, str] | None = None,
    max_epochs: float = MAX_EPOCHS,
) -> list[SourceSpec]:
    """The sources that give `share` of a stage to replaying what the stages of a lineage consumed.

    `lineage_stages` are StageRecords as JSON: `sequence_length` and `sources`, each a SourceSpec with the `rows` and
    `tokens` drawn from it, and optionally `skipped`, ranges [first, stop) of its draws (offset_rows included) that were
    not trained on. Corpora are told apart by fingerprint. Weights are proportional to all tokens consumed of each, also
    by replay; what can be replayed is only what was consumed as fresh data. `moved` says where a corpus (by name) lies
    now. Two corpora of one name are told apart as 'NAME@' and the beginning of their fingerprint, here and in `moved`.
    Raises UserError when the lineage names no data.
    """
    consumed: dict[str, _Consumption] = {}
    for stage in lineage_stages:
        for source in stage["sources"]:
            one = consumed.setdefault(source["fingerprint"], _Consumption(source["name"], source["corpus"]))
            one.add(source, stage["sequence_length"])
    usable = {fingerprint: one for fingerprint, one in consumed.items() if one.tokens and one.seen()}
    total = sum(one.tokens for one in usable.values())
    if not total:
        raise UserError("replay: the lineage names no data that was consumed, so there is nothing to replay")
    # One order per generation: the same seed asked for twice must not replay the same rows first again.
    own_seed = derive(seed, REPLAY, len(lineage_stages))
    result = []
    for fingerprint, one in usable.items():
        is_alone = sum(other.name == one.name for other in usable.values()) == 1
        name = one.name if is_alone else f"{one.name}@{fingerprint[:8]}"
        result.append(
            SourceSpec(
                name=f"{_PREFIX}{name}",
                corpus=str((moved or {}).get(name, one.path)),
                fingerprint=fingerprint,
                weight=share * one.tokens / total,
                role=REPLAY,
                seed=own_seed,
                seen=one.seen(),
                max_epochs=max_epochs,
            )
        )
    return result


def _without(spans: Iterable[tuple[int, int]], removed: Iterable[Any]) -> list[tuple[int, int]]:
    """The parts of disjoint `spans` that no range in `removed` covers, in order."""
    kept = sorted(spans)
    for first, stop in sorted((a, b) for a, b in removed):
        parts = [part for a, b in kept for part in ((a, min(b, first)), (max(a, stop), b))]
        kept = [(a, b) for a, b in parts if a < b]
    return kept
