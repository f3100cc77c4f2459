"""events.jsonl: every measurement of a run, typed, append-only; the only interface to plots and planner.

One JSON object a line with `event` (its type) and, for events inside training, `tokens` (consumed by the run so far).
A run that resumes from an earlier position appends a `resume` event with that position; `read` then leaves out what the
repeated stretch supersedes, so that readers see each position once. `restart` supersedes everything before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError
from perennial.core.files import explain

LASTING = ("resume", "rollback", "set_aside", "save_failed", "hang")
"""Events that stay when a later resume takes back the stretch they lie in: they tell of faults, not of training."""


class Recorder:
    """Appends events to a file; a line torn by a kill is cut off when the file is opened again.

    On a full disk events wait in memory, in their order, and go to the file with the next one that finds room; the
    file never holds a part of a line before a whole one.
    """

    def __init__(self, path: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._path = path
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()  # the watchdog writes from a thread of its own
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = FileIO(path, "a")

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event; it reaches the operating system at once. NaN and infinity are written as texts."""
        if self._file is not None:
            line = json.dumps({"event": event, **_finite(fields), "time": round(self._now(), 3)}, allow_nan=False)
            with self._lock:
                self._waiting.append(line.encode() + b"\n")
                with contextlib.suppress(NoRoom):
                    self._write_waiting()

    def settle(self) -> None:
        """Writes what still waits for room. Raises NoRoom when there is none."""
        with self._lock:
            self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting and self._file is not None:
            end = self._file.seek(0, os.SEEK_END)
            data = memoryview(self._waiting[0])
            try:
                while data:  # a write may take only a part, for one when the disk is about to be full
                    data = data[self._file.write(data) :]
            except OSError as error:
                self._file.truncate(end)
                explained = explain(error, self._path or Path())
                if isinstance(explained, UserError):
                    raise NoRoom(str(explained)) from error
                raise
            del self._waiting[0]

    def close(self) -> None:
        """Makes everything durable and closes the file. Raises NoRoom when events found no room to the end."""
        if self._file is not None:
            try:
                self.settle()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                self._file = None


class NoRoom(UserError):
    """Events could not be written yet: the disk is full, or a limit on files is reached."""


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)


def read(path: Path, *events: str) -> list[dict[str, Any]]:
    """The run's events (of the given types, or all), without those that a later resume or rollback supersedes.

    Raises UserError that names the line of what is no event.
    """
    kept: list[dict[str, Any]] = []
    for record in _lines(path):
        if record["event"] == "restart":
            kept = []
        if record["event"] in ("resume", "rollback"):
            incidents = (*LASTING, *(["spike"] if record["event"] == "rollback" else []))
            kept = [k for k in kept if k.get("tokens", 0) <= record["tokens"] or k["event"] in incidents]
        kept.append(record)
    return [k for k in kept if not events or k["event"] in events]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    what = getattr(error, "msg", error)
                    raise UserError(f"{path}: line {number}: not an event of a run: {what}") from None
                if not isinstance(record, dict) or "event" not in record:
                    raise UserError(f"{path}: line {number}: not an event of a run: it has no 'event'")
                yield record
