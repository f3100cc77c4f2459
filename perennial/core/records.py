"""events.jsonl: every measurement of a run, typed, append-only; the only interface to plots and planner.

One JSON object a line with `event` (its type) and, for events inside training, `tokens` (consumed by the run so far).
A run that resumes from an earlier position appends a `resume` event with that position; `read` then leaves out what the
repeated stretch supersedes, so that readers see each position once. `restart` supersedes everything before it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError


class Recorder:
    """Appends events to a file; a line torn by a kill is cut off when the file is opened again."""

    def __init__(self, path: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = open(path, "a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event; it reaches the operating system at once. NaN and infinity are written as texts."""
        if self._file is not None:
            line = json.dumps({"event": event, **_finite(fields), "time": round(self._now(), 3)}, allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Makes everything durable and closes the file."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


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
            incidents = ("resume", "rollback", *(["spike"] if record["event"] == "rollback" else []))
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
