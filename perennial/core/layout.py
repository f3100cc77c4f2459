"""How the processes of a run are arranged: replicas of the model, shards of each, parts of each large matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from perennial.core.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How many processes each dimension of the mesh has."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def processes(self) -> int:
        """All of them."""
        return self.replicas * self.shards * self.tensor

    @property
    def is_spread(self) -> bool:
        """Whether a process may hold less than the whole model."""
        return self.shards > 1 or self.tensor > 1

    def __str__(self) -> str:
        return f"{self.replicas} x {self.shards} x {self.tensor} (replicate x shard x tensor)"


ROOM_SHARE = 0.5
"""A model is held whole by every process when weights, gradients and moments take at most this share of a device."""


def choose_layout(
    processes: int,
    *,
    per_machine: int,
    shard: str,
    shard_size: int | None,
    tensor: int,
    needed_bytes: float,
    device_bytes: float | None,
) -> Layout:
    """The mesh of a run on this many processes, `per_machine` of them on each machine; a recipe's `parallel` settings.

    'auto' replicates a model whose state (`needed_bytes`: weights, gradients, moments) takes at most half of a device,
    shards it over each machine if that is enough, and over all processes otherwise. Raises UserError for a number of
    processes that the settings do not divide.
    """
    if processes % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the number of processes, {processes}; "
            f"allowed: {listed(divisors(processes))}"
        )
    rest = processes // tensor
    local = max(1, per_machine // tensor)
    local = local if rest % local == 0 else rest
    if shard == "hybrid":
        size = shard_size or local
        if rest % size:
            raise UserError(
                f"parallel.shard_size {size} does not divide the number of processes"
                f"{'' if tensor == 1 else ' per tensor group'}, {rest}; allowed: {listed(divisors(rest)[1:])}"
            )
        return Layout(rest // size, size, tensor)
    if shard == "auto":
        room = math.inf if device_bytes is None else ROOM_SHARE * device_bytes
        shards = next((size for size in (1, local, rest) if needed_bytes / tensor / size <= room), rest)
        return Layout(rest // shards, shards, tensor)
    return Layout(1, rest, tensor) if shard == "full" else Layout(rest, 1, tensor)


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: Iterable[int]) -> str:
    """Numbers for a message."""
    return ", ".join(map(str, numbers)) or "none"
