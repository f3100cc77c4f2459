"""DiLoCo: workers train apart for many updates, then step along the mean of what they moved by.

Formula: after every H updates of its own, worker k holds w_k; with w the model of the last round
    d = w - mean_k w_k; b = m b + d; w = w - r (d + m b) (Nesterov), or w = w - r b; then w_k = w for all k.
    r outer_rate, m outer_momentum. r = 1, m = 0 is local SGD: the mean of the workers.
Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105,
    algorithm 1; local SGD: Stich 2018, "Local SGD Converges Fast and Communicates Little", arXiv 1805.09767.
Differs: H = 30, not 500, and m 0.5, not 0.9: see `outer_momentum`. A stage's last round may be shorter. Moments of the
    inner optimizer stay with their worker, as in the paper; what is saved for others to go on from is their mean.
Limits: the mean weighs all workers alike, also where the batch's rows do not divide evenly between them. A few numbers
    (counts, losses, norms) still go round on every update, so that records are those of the whole: it saves bandwidth,
    not waiting. Two more copies of the weights are held, in memory: w and b. A worker's optimizer sees its share of a
    batch only: where batches are so small that their noise decides, AdamW and Muon gain less from that, even when the
    workers meet after every update (benchmarks/diloco.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from perennial.communications.base import Communication, Rounds, held_bytes, ring_bytes

if TYPE_CHECKING:
    import torch

    from perennial.communications.base import Workers


class DiLoCo(Communication):
    """Bytes are exchanged once in `inner_updates` updates: that many times fewer than gradients would need."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {},
        {"outer_rate": 1.0, "outer_momentum": 0.0},
        {"inner_updates": 500, "outer_rate": 0.7, "outer_momentum": 0.9},
        {"inner_updates": 4, "nesterov": False, "payload": "bf16"},
    ]

    trains_apart: ClassVar[bool] = True
    state_bytes_per_parameter: ClassVar[int] = 8  # w and b in fp32

    inner_updates: int = Field(default=30, ge=1)
    """Updates of a round (H), which each worker makes from its own rows."""
    outer_rate: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    """Factor on the step of a round; 1 with outer_momentum 0 takes the mean of the workers."""
    outer_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Memory of earlier rounds' steps. With 50 rounds and r 0.7, 0.5 was better than 0 and than 0.8; the paper: 0.9."""
    nesterov: bool = True
    """Whether the step looks ahead by one momentum step."""
    payload: Literal["fp32", "bf16"] = "fp32"
    """Numbers in which steps are sent and summed; the model itself stays as exact as it is."""

    def start(self, parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> Rounds:
        """Remembers the parameters as the model that all share."""
        return _OuterSteps(self, parameters, workers)


class _OuterSteps(Rounds):
    def __init__(self, settings: DiLoCo, parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> None:
        import torch

        self._settings, self._workers = settings, workers
        self._parameters = dict(parameters)  # themselves: sharding may give them other memory when training begins
        self._common = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._momentum = {name: torch.zeros_like(common) for name, common in self._common.items()}
        self._is_between = False
        """Whether the parameters are a worker's own."""

    def after_update(self, number: int, *, last: bool) -> int:
        """An outer step when the round is over."""
        self._is_between = number % self._settings.inner_updates > 0 and not last
        if self._is_between:
            return 0
        sent = 0
        for name, parameter in self._parameters.items():
            common = self._common[name]
            step, size = self._mean(common - parameter.detach())
            common.sub_(self._outer(step, self._momentum[name]), alpha=self._settings.outer_rate)
            parameter.detach().copy_(common)
            sent += size
        return ring_bytes(sent, self._workers.number)

    def _mean(self, step: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Mean over the workers, and the bytes of what was summed for it."""
        import torch

        summed = step.to(torch.bfloat16) if self._settings.payload == "bf16" else step
        self._workers.sum(summed)
        return summed.to(step.dtype).div_(self._workers.number), held_bytes(summed)

    def _outer(self, step: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        """The direction of the outer step; the momentum is moved on."""
        factor = self._settings.outer_momentum
        momentum.mul_(factor).add_(step)
        return step.add_(momentum, alpha=factor) if self._settings.nesterov else momentum

    @contextlib.contextmanager
    def common(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Exchanges the contents of the parameters and of the model of the last round, and puts them back."""
        if not self._is_between:
            yield {}
            return
        self._exchange()
        try:
            yield self._common
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.detach().copy_(self._common[name])
            self._common[name].copy_(own)

    def shared_state(self) -> dict[str, torch.Tensor]:
        """The outer momentum."""
        return self._momentum

    def load(self, shared: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        """Takes the outer momentum on, and the worker's own weights in the middle of a round."""
        for name, momentum in self._momentum.items():
            momentum.copy_(shared[name])
        for name, value in own.items():
            self._parameters[name].detach().copy_(value)
        self._is_between = bool(own)

    def forget(self) -> None:
        """Sets the outer momentum to zero."""
        for momentum in self._momentum.values():
            momentum.zero_()
