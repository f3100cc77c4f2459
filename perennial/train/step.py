"""One update: forward and backward over micro-batches, sum over ranks, clip, check that all is finite, optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from perennial.core.errors import TrainingStopped
from perennial.data.loader import Batch
from perennial.optimizers.base import set_rate
from perennial.train.new_rows import NewRows
from perennial.train.parallel import World, sum_gradients, sum_values
from perennial.train.precision import autocast


class NonFinite(TrainingStopped):
    """A loss or gradient was not finite; the update was not made."""


@dataclass(frozen=True)
class TorchBatch:
    """A batch (or a part of one) as tensors: inputs and targets (B, T) int64, segments (B, T) int32 or None."""

    inputs: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None


@dataclass(frozen=True)
class Update:
    """What one update measured. `loss` is in nats per token: the sum over all rows of all ranks, divided once."""

    loss: float
    count: int
    gradient_norm: float
    stop: bool
    """True when any rank was asked to stop."""


def to_torch(batch: Batch, device: torch.device, micro_batch: int) -> Iterator[TorchBatch]:
    """The batch in pieces of `micro_batch` rows, on the device."""
    for start in range(0, len(batch.inputs), micro_batch):
        part = slice(start, start + micro_batch)
        yield TorchBatch(
            torch.from_numpy(batch.inputs[part]).to(device, non_blocking=True),
            torch.from_numpy(batch.targets[part]).to(device, non_blocking=True),
            None if batch.segments is None else torch.from_numpy(batch.segments[part]).to(device, non_blocking=True),
        )


def make_update(
    model: torch.nn.Module,
    optimizer: Any,
    objective: Any,
    batch: Batch,
    *,
    rate: float,
    clip: float | None,
    precision: str,
    micro_batch: int | None,
    world: World,
    new_rows: NewRows | None = None,
    stop: bool = False,
) -> Update:
    """Trains on one batch. Raises NonFinite, with nothing applied, when the loss or a gradient is not finite.

    new_rows: all that is trained, when that is not the whole model.
    """
    trained = new_rows or model
    local = sum(int((row >= 0).sum()) for row in batch.targets)
    count, stops = sum_values([float(local), float(stop)], world)
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    trained.zero_grad(set_to_none=True)
    for part in to_torch(batch, world.device, micro_batch or len(batch.inputs)):
        with autocast(precision, world.device):
            loss = objective.loss(model, part)
        (loss.total / count).backward()
        nats += loss.nats.double()
    if new_rows is not None:
        new_rows.take_gradients()
    sum_gradients(trained.parameters(), world)
    total = sum_values([float(nats)], world)[0]
    norm = float(torch.nn.utils.clip_grad_norm_(trained.parameters(), clip if clip is not None else math.inf))
    if not (math.isfinite(total) and math.isfinite(norm)):
        where = _not_finite(model)
        trained.zero_grad(set_to_none=True)
        raise NonFinite(f"loss {total / count:.4g}, gradient norm {norm:.4g}{where}")
    set_rate(optimizer, rate)
    optimizer.step()
    return Update(total / count, int(count), norm, stops > 0)


def _not_finite(model: torch.nn.Module) -> str:
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    weights = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    text = f"; not finite in the weights of {', '.join(weights[:3])}" if weights else ""
    if bad:
        text += f"; not finite in the gradient of {', '.join(bad[:3])}" + (
            f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        )
    return text
