"""Durations by section: how long training, data, evaluation and saving took, each on its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class Spent:
    """Seconds that one pass through a section took; set when the section ends."""

    seconds: float = 0.0


class Clock:
    """Adds up durations under names. `now` is any function that returns seconds; tests give their own."""

    def __init__(self, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[Spent]:
        """Counts the time until the end of the `with` block under `name`, also when the block raises."""
        spent, start = Spent(), self._now()
        try:
            yield spent
        finally:
            spent.seconds = self._now() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent.seconds

    def seconds(self) -> dict[str, float]:
        """Total seconds of each section so far, in the order of their first end."""
        return dict(self._seconds)
