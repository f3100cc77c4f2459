"""Drawing weights back to the parent's after each step: a pull of `perennial.pulls` at work in a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perennial.core.progress import Progress
from perennial.data.loader import Loader
from perennial.model.placement import local_part, part_like
from perennial.model.through_transformers import AnyModel
from perennial.objectives.next_token import NextToken
from perennial.pulls.base import Pull
from perennial.train.feeding import TorchBatch

_ROWS_READ = 16
"""Rows that are read at a time."""


class Pulling:
    """The parent's weights, and how strongly each weight of a model is drawn back to its own there."""

    def __init__(
        self, model: nn.Module, parent: nn.Module, pull: Pull, importance: Mapping[str, Tensor] | None
    ) -> None:
        """importance: by parameter name, or None for 1 everywhere. The models have the same parameters.

        `model` may be spread over processes; `parent` and `importance` are whole.
        """
        anchors = dict(parent.named_parameters())
        self.strength = pull.strength
        self._weights = [
            (
                parameter,
                part_like(parameter, anchors[name].detach()),
                None if importance is None else part_like(parameter, importance[name]),
            )
            for name, parameter in model.named_parameters()
        ]

    @torch.no_grad()
    def after_step(self, rate: float, *, unless: Tensor | None = None) -> None:
        """Draws every weight back, in place, after a step at `rate`; not where `unless`, a 0/1 number, is 1."""
        for weight, anchor, importance in self._weights:
            pulled: Any = rate * self.strength
            if importance is not None:
                pulled = importance * pulled
            share = pulled / (1 + pulled)
            if unless is not None:
                share = share * (1 - unless)
            local_part(weight).lerp_(anchor, share)


def squared_gradients(
    model: AnyModel, rows: Iterator[TorchBatch], *, num_rows: int, quiet: bool, note: Callable[[], None]
) -> dict[str, Tensor]:
    """Mean over `num_rows` rows of the square of each weight's gradient of the row's mean nats, in fp32, by name.

    rows: one at a time; `note` is called after each. The model's weights need no gradients before or after.
    """
    objective = NextToken()
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    progress = Progress("importance of weights", total=num_rows, unit="rows", quiet=quiet)
    model.requires_grad_(True)
    try:
        for number in range(num_rows):
            loss = objective.loss(model, next(rows))
            (loss.total / loss.count).backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / num_rows)
            model.zero_grad(set_to_none=True)
            progress.update(number + 1)
            note()
    finally:
        model.requires_grad_(False)
        progress.close()
    return squares


def single_rows(loader: Loader, device: torch.device) -> Iterator[TorchBatch]:
    """The rows of an order one by one, from its first on."""
    first = 0
    while True:
        batch = loader.at(first, _ROWS_READ)
        for row in range(_ROWS_READ):
            part = slice(row, row + 1)
            segments = None if batch.segments is None else torch.from_numpy(batch.segments[part]).to(device)
            inputs, targets = (torch.from_numpy(array[part]).to(device) for array in (batch.inputs, batch.targets))
            yield TorchBatch(inputs, targets, segments)
        first += _ROWS_READ
