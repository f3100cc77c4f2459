"""Rows to batches: reads the tokens of any rows of a stage from the memory maps, one batch ahead of who uses them.

The batch at a row is a pure function of the stage's order, so that the state of a loader is the number of the next row,
any number of ranks see the same rows, and preparing a batch ahead changes when it is ready, never what is in it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from perennial.data.corpus import Corpus
from perennial.data.mixture import Rows, StageOrder
from perennial.data.packing import document_segments

_ARRAYS_KEPT = 6
"""Arrays of one shape whose memory is kept: inputs and targets of a batch in use, one ahead and one just let go."""


@dataclass(frozen=True)
class Batch:
    """Rows to train on: B rows of T tokens."""

    inputs: NDArray[np.int64]
    """(B, T)"""
    targets: NDArray[np.int64]
    """(B, T): the token that follows each input."""
    segments: NDArray[np.int32] | None
    """(B, T): number of the document within its row; None when attention may cross documents."""
    source: NDArray[np.int64]
    """(B,): index of each row's source in the stage's mixture."""
    windows: NDArray[np.int64]
    """(B,): the window of T tokens of the corpus in which the row's first target lies."""


Arrangement = Callable[[Batch, Rows, int], Batch]
"""Lays rows out anew: (batch as read, where its tokens lie, the stage's number of its first row) -> batch to train on.

A pure function of these, row by row, so that order stays a function of position. It may write into the arrays given.
"""


class Loader:
    """The batches of a stage. Use as a context manager, or close it; that ends its one thread."""

    def __init__(
        self,
        order: StageOrder,
        corpora: Mapping[str, Corpus],
        *,
        sequence_length: int,
        document_mask: bool,
        separator_id: int,
        arrangement: Arrangement | None = None,
    ) -> None:
        """`corpora` by fingerprint, as for the order; arrangement: None takes the rows as they are read."""
        assert sequence_length == order.sequence_length, f"{sequence_length} is not the order's {order.sequence_length}"
        self._order = order
        self._splits = [corpora[spec.fingerprint].train for spec in order.specs]
        self._document_mask = document_mask
        self._separator_id = separator_id
        self._arrangement = arrangement
        self._memory = _Memory()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="perennial-loader")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def at(self, row: int, count: int, *, rank: int = 0, world: int = 1) -> Batch:
        """A rank's part of the `count` rows from `row` on: row + rank*count//world to row + (rank+1)*count//world.

        Prepares the same part of the next `count` rows in the background.
        """
        assert row >= 0, f"row {row}"
        assert 0 <= rank < world <= count, f"rank {rank} of {world} for {count} rows"
        own = (row + rank * count // world, row + (rank + 1) * count // world)
        batch = self._take(own)
        following = (own[0] + count, own[1] + count)
        self._ahead = (following, self._thread.submit(self._read, *following))
        return batch

    def close(self) -> None:
        """Ends the thread; what it was preparing is dropped."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, rows: tuple[int, int]) -> Batch:
        """The batch of these rows: the one prepared ahead when it is that one, else a new one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == rows:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return self._read(*rows)

    def _read(self, start: int, stop: int) -> Batch:
        plan = self._order.rows(start, stop)
        of, shape = plan.stretches, (stop - start, self._order.sequence_length)
        inputs, targets = self._memory.array(shape), self._memory.array(shape)
        places = of.row * shape[1] + of.column
        for index in np.unique(plan.stretch_source).tolist():
            own = plan.stretch_source == index
            self._splits[index].copy_pairs(
                of.start[own], of.length[own], places[own], inputs=inputs.reshape(-1), targets=targets.reshape(-1)
            )
        segments = None
        if self._document_mask:
            joins = of.column > 0
            segments = document_segments(inputs, self._separator_id, (of.row[joins], of.column[joins]))
        batch = Batch(inputs, targets, segments, plan.source, of.start[of.column == 0] // shape[1])
        return batch if self._arrangement is None else self._arrangement(batch, plan, start)


class _Memory:
    """Arrays whose memory is used again once nothing refers to them any more.

    New memory for each batch would cost more than filling it: the system hands it out zeroed, page by page, and large
    blocks go back at once. A batch that someone keeps stays untouched, as do views and tensors made from it.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, int], deque[bytearray]] = defaultdict(lambda: deque(maxlen=_ARRAYS_KEPT))

    def array(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """An int64 array of any content."""
        free = self._free[shape]
        storage = free.pop() if free else bytearray(shape[0] * shape[1] * np.dtype(np.int64).itemsize)
        flat = np.frombuffer(storage, np.int64)  # every view and tensor made of the result keeps this one alive
        weakref.finalize(flat, free.append, storage).atexit = False
        return flat.reshape(shape)
