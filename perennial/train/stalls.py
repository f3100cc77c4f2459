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

from perennial.core.amounts import human_seconds

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

    def shown(self, wall_seconds: float) -> str:
        """Words for the progress line when the waiting took a share of the time that matters, else ''."""
        if wall_seconds <= 0 or self.seconds < SHOWN_SHARE * wall_seconds:
            return ""
        return f"waited {self.seconds / wall_seconds:.0%} for rank {self.rank} ({self.cause})"


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


def shown_data(data_seconds: float, wall_seconds: float) -> str:
    """Words for the progress line when waiting for data took a share of the time that matters, else ''."""
    if wall_seconds <= 0 or data_seconds < SHOWN_SHARE * wall_seconds:
        return ""
    return f"data {data_seconds / wall_seconds:.0%} ({human_seconds(data_seconds)})"


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
        self._begun: deque[tuple[float, list[Any]]] = deque()
        self._times: list[tuple[float, float]] = []

    def watch(self, parameter: nn.Parameter) -> None:
        """Takes the gradient of this parameter, the first of the model, as the last that backward computes."""
        if self._size > 1:
            parameter.register_post_accumulate_grad_hook(lambda _: self._mark())

    def begin(self, data_seconds: float) -> None:
        """The rows are there, after so many seconds; forward begins."""
        if self._size > 1:
            self._begun.append((data_seconds, [self._now()]))

    def _mark(self) -> None:
        if self._begun:
            marks = self._begun[-1][1]
            marks[1:] = [self._now()]  # the last micro-batch counts
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
        data_seconds, marks = self._begun.popleft()
        self._times.append((data_seconds, self._between(marks)))
        if len(self._times) < EVERY:
            return None
        times = torch.zeros(self._size, EVERY, 2, dtype=torch.float64)
        times[self._rank] = torch.tensor(self._times, dtype=torch.float64)
        self._times = []
        return stall(self._gather(times))

    def drop(self) -> None:
        """Forgets updates that were begun and called off."""
        self._begun.clear()

    def _between(self, marks: list[Any]) -> float:
        if len(marks) < 2:
            return 0.0
        return marks[0].elapsed_time(marks[1]) / 1e3 if self._on_gpu else marks[1] - marks[0]
