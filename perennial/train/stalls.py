"""Where the time of many processes goes: waiting for the slowest of them, or for data.

Every process times its own part of each update: reading its rows, and computing until its last gradient is there. What
follows is exchange, in which all wait for the slowest. Every few updates the times of all are brought together:

    waited(update) = (R max_r t_r - sum_r t_r) / (R - 1)

with R processes and t_r the seconds of process r is what the others waited for the slowest, on average; it is summed
over the updates, so that delays which strike another process each time are counted as well.

Limits: processes that share one copy of the model (FSDP2, tensor parallelism) exchange within each layer, where nobody
can run ahead; of those only the reading is timed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 10
"""Updates between two times at which the processes tell each other their seconds: one small exchange."""
SHOWN_SHARE = 0.05
"""Waiting is shown on the progress line from this share of the time on."""


@dataclass(frozen=True)
class Stall:
    """What the processes waited for each other in the updates since the last time that was asked."""

    seconds: float
    """Waited for the slowest process, averaged over the others and summed over the updates."""
    rank: int
    """The process that was waited for longest."""
    data_seconds: float
    """The part of `seconds` that is explained by this process's having waited longer for data than the others."""

    @property
    def cause(self) -> str:
        """'data' when at least half of the waiting is for that process's data, else 'compute'."""
        return "data" if 2 * self.data_seconds >= self.seconds else "compute"


def stall(times: Tensor) -> Stall:
    """What was waited for the slowest. `times` (R, U, 2): seconds of data and of computing by rank and update."""
    whole = times.sum(2)
    ranks = len(whole)
    latest = whole.max(0).values
    waited = (ranks * latest - whole.sum(0)) / (ranks - 1)
    slowest = int((waited * (whole == latest)).sum(1).argmax())
    data = times[:, :, 0].sum(1)
    others = (data.sum() - data[slowest]) / (ranks - 1)
    total = float(waited.sum())
    return Stall(total, slowest, min(total, max(0.0, float(data[slowest] - others))))


class Lately:
    """What was waited for in the last updates, in words for the progress line, as far as it matters."""

    def __init__(self) -> None:
        self._updates, self._wall, self._data = 0, 0.0, 0.0
        self._text = ""

    def after(self, wall_seconds: float, data_seconds: float, stall: Stall | None) -> str:
        """The words after another update, with a comma before each; '' when waiting took little of the time."""
        self._updates, self._wall, self._data = self._updates + 1, self._wall + wall_seconds, self._data + data_seconds
        if self._updates == EVERY:
            least = SHOWN_SHARE * self._wall
            self._text = f", {self._data / self._wall:.0%} waiting for data" if self._data > least else ""
            if stall is not None and stall.seconds > least:
                self._text += f", {stall.seconds / self._wall:.0%} for rank {stall.rank} ({stall.cause})"
            self._updates, self._wall, self._data = 0, 0.0, 0.0
        return self._text


@dataclass
class _Begun:
    """An update that goes on: seconds (on the host) or events (on a GPU) at both ends of its computing."""

    data_seconds: float
    first: Any = None
    last: Any = None


class Stopwatch:
    """Times a process's own part of each update, on the host or, where that runs ahead, on the GPU."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device,
        gather: Callable[[Tensor], Tensor],
        on_last_gradient: Callable[[], None] = lambda: None,
    ) -> None:
        """`gather` sums a float64 tensor on the host over all processes; `on_last_gradient` tells that own work ends.

        A process that is alone has nothing to wait for: then nothing is timed.
        """
        self._rank, self._size, self._gather = rank, size, gather
        self._on_last_gradient = on_last_gradient
        self._on_gpu = device.type == "cuda"
        self._begun: deque[_Begun] = deque()
        self._times: list[tuple[float, float]] = []
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Takes the module of the first parameter that is trained as where forward begins and backward ends."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._size == 1:
            return
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    self._hooks = [
                        module.register_forward_pre_hook(lambda *_: self._mark_begin()),
                        parameter.register_post_accumulate_grad_hook(lambda _: self._mark_end()),
                    ]
                    return

    def begin(self, data_seconds: float) -> None:
        """An update's rows are there, after so many seconds."""
        if self._size > 1:
            self._begun.append(_Begun(data_seconds))

    def _mark_begin(self) -> None:
        if self._begun and self._begun[-1].first is None:
            self._begun[-1].first = self._now()

    def _mark_end(self) -> None:
        if self._begun:
            self._begun[-1].last = self._now()  # again for each micro-batch: the last one counts
        self._on_last_gradient()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> Stall | None:
        """To be called on every process when the oldest update that was begun is done; now and then with a result."""
        if self._size == 1 or not self._begun:
            return None
        begun = self._begun.popleft()
        self._times.append((begun.data_seconds, self._compute_seconds(begun)))
        if len(self._times) < EVERY:
            return None
        times = torch.zeros(self._size, EVERY, 2, dtype=torch.float64)
        times[self._rank] = torch.tensor(self._times, dtype=torch.float64)
        self._times = []
        return stall(self._gather(times))

    def drop(self) -> None:
        """Forgets updates that were begun and called off."""
        self._begun.clear()

    def _compute_seconds(self, begun: _Begun) -> float:
        if begun.first is None or begun.last is None:
            return 0.0
        return begun.first.elapsed_time(begun.last) / 1e3 if self._on_gpu else begun.last - begun.first
