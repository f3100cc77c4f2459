"""Saving while training goes on: a copy of the state is taken, and a thread writes it.

Copying takes memory for a second set of weights and moments and a fraction of the time that writing takes. So it is
done for states that take long to write, where the copy fits easily; otherwise training waits for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from perennial.core.environment import memory_bytes
from perennial.core.errors import UserError
from perennial.train.parallel import World
from perennial.train.watchdog import exchange_limit

T = TypeVar("T")

LARGE_BYTES = 1 << 28
"""States below this are on disk within about a second; a copy and a thread would save little of it."""

SPARE_SHARE = 0.5
"""A copy may take this share of the memory that is free."""


def pays(num_bytes: float) -> bool:
    """Whether a state of this size is better written from a copy in the background."""
    free = memory_bytes()["available"]
    return num_bytes >= LARGE_BYTES and free is not None and num_bytes <= SPARE_SHARE * free


class Crew:
    """The processes that write a checkpoint together, each in its own thread: what one fails at, all fail at."""

    def __init__(self, world: World) -> None:
        """Every process has to make its own at the same point."""
        self.process, self.processes = world.rank, world.size
        self.group: Any = None
        """A group of its own, so that a thread's exchanges do not meet those of training; None for one process."""
        if world.size > 1:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo", timeout=exchange_limit())

    def all(self, work: Callable[[], T]) -> T:
        """Does `work` on every process; raises on all of them when it fails on one."""
        result, error = self._try(work)
        if self.group is not None:
            self._tell_each_other(error)
        if error is not None:
            raise error
        assert result is not None
        return result[0]

    def main(self, work: Callable[[], T]) -> T:
        """Does `work` on the main process, and gives its result to all; raises on all of them when it fails."""
        if self.group is None:
            return work()
        import torch.distributed as dist

        result, error = self._try(work) if self.process == 0 else (None, None)
        # only the text of an error travels: on the main process it is raised as it is
        shared: list[Any] = [result, None if error is None else str(error)]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if error is not None:
            raise error
        if shared[1] is not None:
            raise UserError(shared[1])
        answer: T = shared[0][0]
        return answer

    def _try(self, work: Callable[[], T]) -> tuple[tuple[T] | None, BaseException | None]:
        try:
            return (work(),), None
        except BaseException as error:
            if self.group is None:
                raise
            return None, error

    def _tell_each_other(self, error: BaseException | None) -> None:
        import torch.distributed as dist

        texts: list[str | None] = [None] * self.processes
        dist.all_gather_object(texts, None if error is None else f"process {self.process}: {error}", group=self.group)
        if error is None and (failed := [text for text in texts if text is not None]):
            raise UserError(failed[0])


class Saving:
    """One checkpoint being written. `write` returns its folder; what it raises is raised by `finish`."""

    def __init__(self, write: Callable[[], Path], *, tokens: int, in_background: bool) -> None:
        self.tokens = tokens
        self.seconds = 0.0
        """Wall time of writing."""
        self._write = write
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="saving") if in_background else None
        if self._thread:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        begun = time.perf_counter()
        try:
            self._path = self._write()
        except BaseException as error:  # it belongs to the thread that trains
            self._error = error
        self.seconds = time.perf_counter() - begun

    @property
    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Waits until the checkpoint is whole; returns its folder, or raises what went wrong."""
        if self._thread:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path
