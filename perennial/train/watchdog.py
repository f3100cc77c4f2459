"""A watch over all processes of a run: one that hangs is named, and the run ends so that its launcher starts it again.

A process that is stopped, or waits for a file server that is gone, takes all others with it: they wait in the next
exchange, and nothing says for whom. Here every process notes what it is doing in a store that all can read, and a
thread of each looks after its own progress. Once that has stood still for too long it reads the notes of the others,
names those that are behind, and ends the process with an exit code on which `torchrun --max-restarts` begins again at
the last checkpoint.

Differs: torch's own time limit of a collective tells which operation was waited for, not which process was missing.
Limits: processes that stand still in the same exchange are told apart only by signs of life and by their stacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from perennial.core.amounts import human_seconds, parse
from perennial.core.errors import UserError

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: a failure that may pass; try again."""
PHASES = ("start", "data", "update", "exchange", "evaluate", "save")
"""What a process does, in the order in which it does it between two updates."""
LONG_PHASES = {"start": 3.0, "evaluate": 3.0, "save": 3.0}
"""Phases that may take this many times the limit: reading and writing whole models, with nothing to note in between."""
_LONGEST = 3.0
_VARIABLE = "PERENNIAL_TIMEOUT"
_FRAMES = 6
"""Innermost calls of a stack that are shown."""


class Store(Protocol):
    """The part of torch's key-value store that is needed."""

    def set(self, key: str, value: str) -> Any:
        """Writes a value."""

    def get(self, key: str) -> bytes:
        """The value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


@dataclass(frozen=True)
class Note:
    """What a process last said of itself."""

    rank: int
    host: str
    pid: int
    device: str
    update: int = 0
    """Updates begun."""
    phase: str = "start"
    age: float = 0.0
    """Seconds that it had been in this phase when it said so, by its own clock."""
    beat: int = 0
    """Rises with every note, so that one who is alive can be told from one who is not."""
    stack: tuple[str, ...] = ()
    """Innermost calls of the main thread, innermost last; once it has stood still for too long."""

    @property
    def position(self) -> tuple[int, int]:
        """How far the process is; the smaller one is behind."""
        return self.update, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid}, {self.device})"


@dataclass(frozen=True)
class Seen:
    """Another process's note, and for how long nothing new has come from it."""

    note: Note
    silent: float

    @property
    def seconds(self) -> float:
        """How long it has been where its note says, as far as can be known."""
        return self.note.age + self.silent


@dataclass(frozen=True)
class Hang:
    """What stands still."""

    behind: tuple[Seen, ...]
    """Those for whom the others wait; empty when all wait in the same exchange."""
    everyone: tuple[Seen, ...]

    @property
    def ranks(self) -> list[int]:
        """The ranks that are behind."""
        return [seen.note.rank for seen in self.behind]

    def speaker(self) -> int:
        """The rank that tells it: the first that is not behind itself."""
        return min((s.note.rank for s in self.everyone if s not in self.behind), default=0)

    def __str__(self) -> str:
        size = len(self.everyone)
        if not self.behind:
            head = f"all {size} processes are in the same place, so none is known to be behind; where each stands:"
            return "\n".join([f"hang: {head}", *(f"  {_where(seen)}" for seen in self.everyone)])
        waiting = [s for s in self.everyone if s not in self.behind]
        lines = [f"hang: {s.note} of {size} is behind: {_doing(s)}" for s in self.behind]
        for seen in self.behind:
            lines += [f"  rank {seen.note.rank} stands at {frame}" for frame in seen.note.stack]
        if waiting:
            longest = max(waiting, key=lambda s: s.seconds)
            ranks = ", ".join(str(s.note.rank) for s in waiting[:8]) + (", ..." if len(waiting) > 8 else "")
            lines.append(f"waiting for it: {'rank' if len(waiting) == 1 else 'ranks'} {ranks}, {_doing(longest)}")
        return "\n".join(lines)


def _doing(seen: Seen) -> str:
    note = seen.note
    silence = f", no sign of life for {human_seconds(seen.silent)}" if seen.silent > 0 else ""
    return f"update {note.update}, phase '{note.phase}', for {human_seconds(seen.seconds)}{silence}"


def _where(seen: Seen) -> str:
    stack = f", at {seen.note.stack[-1]}" if seen.note.stack else ""
    return f"{seen.note}: {_doing(seen)}{stack}"


def find_hang(own: Seen, others: list[Seen], *, limit: float, silence: float) -> Hang | None:
    """What keeps this process waiting, once it has been for longer than `limit` seconds; None: it may go on.

    A process is behind when nothing came from it for `silence` seconds, or when it is at an earlier position than the
    others and has itself been there for longer than the limit: one that is slow but goes on is waited for.
    """
    if own.seconds <= limit * LONG_PHASES.get(own.note.phase, 1.0):
        return None
    everyone = tuple(sorted([own, *others], key=lambda s: s.note.rank))
    mute = [s for s in others if s.silent >= silence]
    if mute:
        return Hang(tuple(sorted(mute, key=lambda s: s.note.rank)), everyone)
    first, last = min(s.note.position for s in everyone), max(s.note.position for s in everyone)
    late = tuple(s for s in everyone if s.note.position == first) if first < last else ()
    if any(s.seconds <= limit * LONG_PHASES.get(s.note.phase, 1.0) for s in late):
        return None
    return Hang(late, everyone)


def time_limit(variables: Mapping[str, str] = os.environ) -> float:
    """Seconds that a process may stand still: PERENNIAL_TIMEOUT ('10 min'), by default ten minutes. 0: for ever."""
    text = variables.get(_VARIABLE, "10 min")
    try:
        return parse(text, ("seconds",)).value
    except ValueError as error:
        raise UserError(f"{_VARIABLE}={text}: {error}; '0 s' turns the watch over hanging processes off") from None


def exchange_limit() -> timedelta:
    """Time limit for torch's own collectives: long enough that the watchdog, which knows more, speaks first."""
    return timedelta(seconds=(_LONGEST + 1) * (time_limit() or 86400.0))


def stack_of(thread_id: int | None) -> tuple[str, ...]:
    """Innermost calls of a thread of this process, 'file.py:12 in function', innermost last."""
    frame = sys._current_frames().get(thread_id or 0)
    found = traceback.extract_stack(frame)[-_FRAMES:] if frame else []
    return tuple(f"{Path(call.filename).name}:{call.lineno} in {call.name}" for call in found)


class Watchdog:
    """Notes what the thread that makes it does, and watches over all. `enter` costs the loop one assignment.

    store: None for a process that is alone; nothing is watched then.
    on_hang: called with the hang before the process ends, on every rank.
    """

    def __init__(
        self,
        note: Note,
        size: int,
        store: Store | None,
        *,
        limit: float,
        on_hang: Callable[[Hang], None] = lambda hang: None,
        end: Callable[[int], None] = os._exit,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note, self._size, self._store, self._limit = note, size, store, limit
        self._on_hang, self._end, self._now = on_hang, end, now
        self._at: tuple[int, str, float] = (0, "start", now())
        self._heard: dict[int, tuple[int, float]] = {}
        self._watched = threading.get_ident()
        self._interval = min(5.0, max(0.1, limit / 20))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._beat = 0

    def start(self) -> None:
        """Begins to watch, in a thread; what was done before took as long as it took."""
        self.go_on()
        if self._store is not None and self._limit > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def enter(self, phase: str, update: int | None = None) -> None:
        """Says what the process does from now on; saying the same again says that it has got further."""
        self._at = (self._at[0] if update is None else update, phase, self._now())

    def go_on(self) -> None:
        """Says that the process is where it was, but knows why and does not hang."""
        self._at = (*self._at[:2], self._now())

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)  # it may be waiting for a store that is gone

    def look(self) -> Hang | None:
        """Publishes this process's note and says what hangs, if anything does."""
        assert self._store is not None
        own = self._noted()
        self._store.set(str(own.rank), json.dumps(asdict(own)))
        if own.age <= self._limit / 2:
            self._heard = {}
            return None
        others = [self._read(rank) for rank in range(self._size) if rank != own.rank]
        silence = max(3 * self._interval, self._limit / 4)
        return find_hang(Seen(own, 0.0), others, limit=self._limit, silence=silence)

    def _noted(self) -> Note:
        update, phase, since = self._at
        age = self._now() - since
        self._beat += 1
        stack = stack_of(self._watched) if age > self._limit / 2 else ()
        return replace(self._note, update=update, phase=phase, age=age, beat=self._beat, stack=stack)

    def _read(self, rank: int) -> Seen:
        assert self._store is not None
        note = Note(rank, "unknown", 0, "device unknown", beat=-1)
        if self._store.check([str(rank)]):
            note = Note(**json.loads(self._store.get(str(rank))))
        now = self._now()
        beat, since = self._heard.get(rank, (-2, now))
        if beat != note.beat:
            since = now
            self._heard[rank] = (note.beat, now)
        silent = now - since
        return Seen(replace(note, stack=tuple(note.stack)), silent if silent > 2 * self._interval else 0.0)

    def _watch(self) -> None:
        unreachable_since: float | None = None
        while not self._closed.wait(self._interval):
            try:
                hang = self.look()
                unreachable_since = None
            except Exception as error:  # the store's host is gone, or stopped; torch has several types for that
                unreachable_since = unreachable_since or self._now()
                stuck = self._now() - self._at[2] > self._limit * LONG_PHASES.get(self._at[1], 1.0)
                if stuck and self._now() - unreachable_since > self._limit / 4:
                    self._tell(f"hang: the processes' store does not answer ({error}); {self._own_place()}")
                    self._leave()
                    return
                continue
            if hang is not None:
                self._report(hang)
                self._leave()
                return

    def _own_place(self) -> str:
        return _where(Seen(self._noted(), 0.0))

    def _report(self, hang: Hang) -> None:
        rank = self._note.rank
        if rank == hang.speaker():
            self._tell(str(hang))
        elif rank in hang.ranks:
            self._tell(f"hang: {self._own_place()}")
        # Records may lie on the very file system that hangs: they get a thread of their own, and a while.
        recording = threading.Thread(target=self._on_hang, args=(hang,), daemon=True)
        recording.start()
        recording.join(timeout=2 * self._interval)

    def _tell(self, text: str) -> None:
        limit = human_seconds(self._limit)
        advice = (
            f"ending this process with exit code {EXIT_CODE}; torchrun --max-restarts goes on from the last checkpoint "
            f"(time limit {limit}; {_VARIABLE}='30 min' for another)"
        )
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n{advice}\n")
            sys.stderr.flush()

    def _leave(self) -> None:
        self._closed.wait(2 * self._interval)  # so that every process can say its part before the launcher ends all
        self._end(EXIT_CODE)


def watch(
    rank: int, size: int, device: torch.device, *, on_hang: Callable[[Hang], None] = lambda hang: None
) -> Watchdog:
    """The watchdog of this process, to be started; it is idle for a process that is alone. Raises UserError."""
    note = Note(rank, socket.gethostname(), os.getpid(), str(device))
    return Watchdog(note, size, _store(size), limit=time_limit(), on_hang=on_hang)


def _store(size: int) -> Store | None:
    """The process group's store, over a connection of its own: the group's may be waited on for long."""
    import torch.distributed as dist

    if size == 1 or not dist.is_initialized():
        return None
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import _get_default_store

    default: Any = _get_default_store()
    store = default.clone()
    store.set_timeout(timedelta(seconds=20))
    prefixed: Any = PrefixStore("perennial/notes", store)
    return prefixed
