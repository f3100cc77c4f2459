"""One update: forward and backward over micro-batches, sum over processes, clip, check that all is finite, optimizer.

Nothing here waits for the device: what an update measured is read when `Queued.finish` is called, which on a GPU may be
after the next update was queued.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perennial.core.errors import TrainingStopped
from perennial.data.loader import Batch
from perennial.model.placement import local_part
from perennial.optimizers.base import set_rate, skips_on_device
from perennial.train.feeding import TorchBatch
from perennial.train.new_rows import NewRows
from perennial.train.parallel import Spread, clip_gradients, summed
from perennial.train.precision import autocast
from perennial.train.pulling import Pulling


class NonFinite(TrainingStopped):
    """A loss or gradient was not finite; the update was not made."""


@dataclass(frozen=True)
class Update:
    """What one update measured. `loss` is in nats per token: the sum over all rows of all processes, divided once."""

    loss: float
    count: int
    gradient_norm: float
    stop: bool
    """True when any process was asked to stop."""


class Queued:
    """An update whose numbers may still be on their way from the device."""

    def __init__(self, model: torch.nn.Module, numbers: Tensor) -> None:
        """`numbers`: nats, count of targets, number of processes asked to stop, gradient norm; float64 (4,)."""
        self._model, self._numbers = model, numbers
        self._arrived: Any = None
        self._result: Update | NonFinite | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def finish(self) -> Update:
        """Waits for the numbers. Raises NonFinite, when the update was not made, if one of them is not finite."""
        if self._result is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            nats, count, stops, norm = self._numbers.tolist()
            self._result = Update(nats / count, int(count), norm, stops > 0)
            if not (math.isfinite(nats) and math.isfinite(norm)):
                where = _not_finite(self._model)
                self._result = NonFinite(f"loss {nats / count:.4g}, gradient norm {norm:.4g}{where}")
        if isinstance(self._result, NonFinite):
            raise self._result
        return self._result


def make_update(
    spread: Spread,
    optimizer: Any,
    objective: Any,
    batch: Batch,
    *,
    rate: float,
    clip: float | None,
    precision: str,
    micro_batch: int | None,
    rows: int,
    new_rows: NewRows | None = None,
    pulling: Pulling | None = None,
    stop: bool = False,
) -> Queued:
    """Trains on one batch, of which this is the part of one process; `rows` is the size of the whole.

    An update whose loss or gradient is not finite is not made, which `Queued.finish` tells. new_rows: all that is
    trained, when that is not the whole model. pulling: what draws the weights back once the step is made. Of workers
    that train apart each divides its loss by the count of its own targets; the loss told is that of all rows, the
    gradient norm the mean of the workers'.
    """
    world, trained = spread.world, new_rows or spread.model
    device = world.device
    most_rows = -(-rows // world.data_size)
    local = sum(int((row >= 0).sum()) for row in batch.targets) if world.speaks else 0
    # The number of targets of each worker; it stays on the device, where the loss is divided by it.
    of_workers = [local if worker == spread.worker else 0 for worker in range(spread.workers)]
    counts = summed(spread.feeder.numbers(*of_workers, stop), world)
    # gradients are averaged over the processes of a worker that read different rows
    share = world.data_size // spread.workers / counts[spread.worker]
    nats = torch.zeros(1, dtype=torch.float64, device=device)
    trained.zero_grad(set_to_none=not spread.keeps_gradients)
    pieces = spread.feeder.pieces(batch, micro_batch or most_rows, most_rows)
    for number, part in enumerate(pieces):
        with spread.summing(now=number == len(pieces) - 1):
            with autocast(precision, device):
                total, part_nats = spread.train_on(_sums, objective, part)
            (total * share).backward()
        nats += part_nats.double()
    if new_rows is not None:
        new_rows.take_gradients()
    spread.finish_gradients()
    nats = summed(nats if world.speaks else torch.zeros_like(nats), world)
    norm = clip_gradients(trained.parameters(), clip if clip is not None else math.inf).detach().double().reshape(1)
    if spread.workers > 1:  # each has its own; the mean tells all of them when one is not finite
        norm = summed(norm / world.size, world)
    set_rate(optimizer, rate)
    queued = Queued(spread.model, torch.cat((nats, counts[:-1].sum(0, keepdim=True), counts[-1:], norm)))
    if device.type == "cuda" and skips_on_device(optimizer):
        optimizer.found_inf = (~(torch.isfinite(nats[0]) & torch.isfinite(norm[0]))).float()
        optimizer.step()
        if pulling is not None:
            pulling.after_step(rate, unless=optimizer.found_inf)
    elif _step_if_finite(queued, optimizer, trained) and pulling is not None:
        pulling.after_step(rate)
    return queued


def _step_if_finite(queued: Queued, optimizer: Any, trained: Any) -> bool:
    """Makes the step and returns True, unless a number is not finite."""
    try:
        queued.finish()
    except NonFinite:
        trained.zero_grad(set_to_none=True)
        return False
    optimizer.step()
    return True


def _sums(model: torch.nn.Module, objective: Any, batch: TorchBatch) -> tuple[Tensor, Tensor]:
    loss = objective.loss(model, batch)
    return loss.total, loss.nats


def _not_finite(model: torch.nn.Module) -> str:
    named = dict(model.named_parameters())
    bad = [n for n, p in named.items() if p.grad is not None and not torch.isfinite(local_part(p.grad)).all()]
    weights = [n for n, p in named.items() if not torch.isfinite(local_part(p)).all()]
    text = f"; not finite in the weights of {', '.join(weights[:3])}" if weights else ""
    if bad:
        text += f"; not finite in the gradient of {', '.join(bad[:3])}" + (
            f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        )
    return text
