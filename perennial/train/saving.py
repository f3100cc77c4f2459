"""Saving while training goes on: a copy of the state is taken, and a thread writes it.

Copying takes memory for a second set of weights and moments and a fraction of the time that writing takes. So it is
done for states that take long to write, where the copy fits easily; otherwise training waits for the disk.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from perennial.core.environment import memory_bytes

M = TypeVar("M", bound=torch.nn.Module)

LARGE_BYTES = 1 << 28
"""States below this are on disk within about a second; a copy and a thread would save little of it."""

SPARE_SHARE = 0.5
"""A copy may take this share of the memory that is free."""


def pays(num_bytes: int) -> bool:
    """Whether a state of this size is better written from a copy in the background."""
    free = memory_bytes()["available"]
    return num_bytes >= LARGE_BYTES and free is not None and num_bytes <= SPARE_SHARE * free


def state_size(model: torch.nn.Module, moments: Mapping[str, torch.Tensor]) -> int:
    """Bytes of parameters and moments."""
    tensors = [*model.parameters(), *moments.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copied(model: M, moments: Mapping[str, torch.Tensor]) -> tuple[M, dict[str, torch.Tensor]]:
    """The model without gradients and the moments, in memory of their own."""
    return copy.deepcopy(model), {name: tensor.clone() for name, tensor in moments.items()}


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
