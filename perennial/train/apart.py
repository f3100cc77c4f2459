"""Workers that train apart (see `perennial.communications`): how they reach each other, and their part of a checkpoint.

    perennial/communication.safetensors       what is remembered from round to round, the same for all workers
    perennial/workers/weights-0.safetensors   worker 0's own weights, between two rounds
    perennial/workers/moments-0.safetensors   its own state of the optimizer

The checkpoint's model is the one that all workers share, of the last round; its `optimizer.safetensors` is the mean of
the workers' moments. Another number of workers goes on from these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from perennial.core.lineage import STATE_FOLDER
from perennial.model.placement import local_part
from perennial.train.parallel import World
from perennial.train.tensor_files import save_tensors

SHARED = "communication"
"""Name of the file with what is remembered from round to round."""
FOLDER = "workers"
"""Of the state folder: what each worker has of its own."""


class Replicas:
    """The workers of a world: its places along the mesh's 'replicate' dimension, each a process or a group of them."""

    def __init__(self, world: World, *, apart: bool) -> None:
        """Every process has to make its own at the same point. `apart`: whether they train apart."""
        self.number = world.layout.replicas
        self.own = world.worker
        """The number of this process's worker."""
        self.group = _group_within(world) if apart else None
        """The processes of this worker, for its files; None for one alone."""
        self._exchange: Any = None if world.mesh is None else world.mesh.get_group("replicate")

    def sum(self, tensor: Tensor) -> None:
        """Adds up a tensor, or a process's part of one, over the workers, in place; every process has to call it."""
        if self.number > 1:
            dist.all_reduce(local_part(tensor), group=self._exchange)

    def mean(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the workers of each tensor, in memory of its own."""
        means = {}
        for name, tensor in tensors.items():
            means[name] = tensor.detach().clone()
            if tensor.is_floating_point():
                self.sum(means[name])
                means[name] /= self.number
        return means


def _group_within(world: World) -> Any:
    """A group of the processes that this process's worker consists of, apart from those of training."""
    together = world.size // world.layout.replicas
    if together == 1:
        return None
    ranks = range(world.size)
    groups = [dist.new_group(ranks[first : first + together], backend="gloo") for first in ranks[::together]]
    return groups[world.worker]


@dataclass(frozen=True)
class Own:
    """What one worker has of its own at a moment, and what is remembered from round to round."""

    worker: int
    group: Any
    """The group of the processes that this worker consists of; None for one alone."""
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    def copied(self) -> Own:
        """The same in memory of its own."""

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

        return Own(self.worker, self.group, copies(self.weights), copies(self.moments), copies(self.shared))

    def save(self, checkpoint: Path, everybody: Callable[[Callable[[], None]], None], group: Any) -> None:
        """Writes this worker's files and its share of what all have in common; every process of `group` calls it.

        everybody: does some work on every process, and raises on all when one fails.
        """
        folder = checkpoint / STATE_FOLDER / FOLDER

        def own() -> None:
            folder.mkdir(exist_ok=True)
            save_tensors(folder, f"weights-{self.worker}", self.weights, group=self.group)
            save_tensors(folder, f"moments-{self.worker}", self.moments, group=self.group)

        everybody(own)
        save_tensors(checkpoint / STATE_FOLDER, SHARED, self.shared, group=group)


def workers_of(checkpoint: Path) -> int:
    """How many workers trained apart for a checkpoint; 0 when none did."""
    found = (re.match(r"moments-(\d+)\b", path.name) for path in (checkpoint / STATE_FOLDER / FOLDER).glob("moments-*"))
    return len({match[1] for match in found if match})
