"""Gradients are summed over the workers on every update: all of them hold the same model.

Formula: g = sum_k g_k, and one update of the optimizer with g on every worker.
Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv 2006.15704;
    over shards: Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277, section 3.2 (hybrid sharding).
Limits: sends gradients as large as the model on every update, so that workers need a fast network between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from perennial.communications.base import Communication, Rounds, held_bytes, ring_bytes

if TYPE_CHECKING:
    import torch

    from perennial.communications.base import Workers


class EveryUpdate(Communication):
    """The usual communication, which computes what one process would; the sum is part of the backward pass."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}]

    trains_apart: ClassVar[bool] = False

    def start(self, parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> Rounds:
        """Has nothing to exchange between updates; counts what the backward passes sent."""
        return _Counted(parameters, workers)


class _Counted(Rounds):
    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> None:
        self._parameters, self._workers = list(parameters.values()), workers

    def after_update(self, number: int, *, last: bool) -> int:
        """The bytes of all gradients, in the ring."""
        trained = sum(held_bytes(parameter) for parameter in self._parameters if parameter.requires_grad)
        return ring_bytes(trained, self._workers.number)
