"""Parameters that are spread over processes: filling in a process's part, and putting the whole together again.

A parameter is a plain tensor, or a DTensor of which each process of a mesh holds a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of the tensor."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    spread: Any = tensor
    return spread.to_local() if is_spread(tensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Fills this process's part of `parameter` from the whole `value`, of the same shape on any device."""
    local_part(parameter).copy_(part_like(parameter, value))


def part_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The part of the whole `value` that this process holds of `parameter`, which has its shape; a view."""
    if not is_spread(parameter):
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = parameter
    shape, offset = compute_local_shape_and_global_offset(spread.shape, spread.device_mesh, spread.placements)
    return value[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor on every process that holds a part of it; all of them have to ask for it."""
    spread: Any = tensor.detach()
    return spread.full_tensor() if is_spread(tensor) else spread


def mesh_of(tensor: Tensor) -> Any:
    """The mesh that a tensor is spread over; None for a plain one. Tensors of one mesh can be computed on together."""
    return getattr(tensor, "device_mesh", None)
