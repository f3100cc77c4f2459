"""Data parallelism: the same code on one process and, under `torchrun`, on many.

Every rank computes its rows of each batch, divided by the global count; the gradients are then summed. So the result is
that of one process up to the order of additions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks."""
        return self.rank == 0


def join_world() -> World:
    """Joins the process group that `torchrun` describes in the environment; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return World(dist.get_rank() if size > 1 else 0, size, device)


def leave_world(world: World) -> None:
    """Ends the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world: World, bucket_bytes: int = 32 << 20) -> None:
    """Replaces every gradient by its sum over all ranks, in buckets of about `bucket_bytes`."""
    if world.size == 1:
        return
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:  # every rank must send the same tensors
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(g.numel() * g.element_size() for g in bucket) >= bucket_bytes:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_values(values: list[float], world: World) -> list[float]:
    """Each number summed over all ranks, in float64."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def wait_for_all(world: World) -> None:
    """Returns when every rank has come here."""
    if world.size > 1:
        dist.barrier()
