"""One line of progress with rate and time left: redrawn on a terminal, now and then in a log, never when quiet."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from perennial.core.amounts import human, human_seconds

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 10.0


class Progress:
    """Reports how far a job is; everything goes to standard error, so that results can be piped.

    The rate counts from the first `update`: a job that resumes at the middle does not claim the first half as speed.
    """

    def __init__(
        self,
        label: str,
        *,
        total: float | None = None,
        unit: str = "",
        quiet: bool = False,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._unit, self._quiet = label, total, unit, quiet
        self._stream = sys.stderr if stream is None else stream
        self._now = now
        self._is_terminal = self._stream.isatty()
        self._first: tuple[float, float] | None = None  # (time, done) of the first update
        self._shown_at = float("-inf")
        self._latest = ""
        self._is_drawn = False

    def update(self, done: float, text: str = "") -> None:
        """`done` units are finished; shown at most a few times a second (terminal) or every 10 seconds (log).

        `text` takes the place of the rate.
        """
        if self._quiet:
            return
        moment = self._now()
        if self._first is None:
            self._first = (moment, done)
            self._shown_at = moment if not self._is_terminal else self._shown_at
        self._latest = self._line(done, moment, text)
        if moment - self._shown_at >= (_TERMINAL_SECONDS if self._is_terminal else _LOG_SECONDS):
            self._shown_at = moment
            self._show(self._latest)
            self._latest = self._latest if self._is_terminal else ""

    def __call__(self, done: float, total: float, text: str = "") -> None:
        """`update` in the shape of a callback, for work that finds out its total by itself."""
        self._total = total
        self.update(done, text)

    def note(self, text: str) -> None:
        """Says something that stays: a line of its own above the progress line."""
        if self._quiet:
            return
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            if self._is_drawn:
                self._stream.write("\r\x1b[2K")
            self._stream.write(text + "\n")
            self._stream.flush()
        self._is_drawn, self._latest = False, ""

    def close(self) -> None:
        """Leaves the last progress line standing, unless a note has come after it."""
        if not self._latest:
            return
        self._show(self._latest)
        if self._is_drawn:
            self._stream.write("\n")
            self._stream.flush()
        self._is_drawn, self._latest = False, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_drawn:
            self._latest = ""  # a half-way line after the fact would only distract from the error
        self.close()

    def _line(self, done: float, moment: float, text: str) -> str:
        assert self._first is not None
        start, start_done = self._first
        rate = (done - start_done) / (moment - start) if moment > start else 0.0
        parts = [f"{self._label} {human(done)}"]
        if self._total:
            parts = [f"{self._label} {min(1.0, done / self._total):.0%} of {human(self._total, self._unit)}"]
        elif self._unit:
            parts = [f"{self._label} {human(done, self._unit)}"]
        if text:
            parts.append(text)
        elif rate > 0:
            parts.append(f"{human(rate, self._unit)}/s")
        if self._total and rate > 0 and done < self._total:
            parts.append(f"{human_seconds((self._total - done) / rate)} left")
        return ", ".join(parts)

    def _show(self, line: str) -> None:
        with contextlib.suppress(OSError):  # as for notes
            if self._is_terminal:
                width = shutil.get_terminal_size().columns - 1
                self._stream.write("\r\x1b[2K" + line[:width])
                self._is_drawn = True
            else:
                self._stream.write(line + "\n")
            self._stream.flush()
