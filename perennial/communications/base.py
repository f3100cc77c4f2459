"""What a communication is: how the workers, each with a copy of the model, exchange what they have learned.

A worker is the process, or the group of processes between which the layout divides the model, that holds one copy: one
place of the mesh's 'replicate' dimension. What moves inside a group is not a communication's business, nor counted.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from perennial.core.settings import Settings

if TYPE_CHECKING:
    from typing import Protocol

    import torch

    class Workers(Protocol):
        """All workers, as one of them reaches the others."""

        @property
        def number(self) -> int:
            """How many there are."""

        def sum(self, tensor: torch.Tensor) -> None:
            """Adds up a tensor over the workers, in place; every worker has to call it."""


class Rounds:
    """The communication of one run in progress, as one process holds it; by itself it exchanges nothing."""

    def after_update(self, number: int, *, last: bool) -> int:
        """Exchanges what is due after an update; returns the bytes that this process sent because of it.

        number: that of the update in its stage, from 1; last: no other follows in this stage. Every process calls it.
        """
        return 0

    @contextlib.contextmanager
    def common(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Within it the parameters hold the model that all workers share; yields by name what they hold otherwise.

        Nothing, where that is always the same. To be used while no update is being made.
        """
        yield {}

    def shared_state(self) -> dict[str, torch.Tensor]:
        """What is remembered from round to round by parameter name, the same on all workers; live tensors."""
        return {}

    def load(self, shared: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a saved `shared_state` and, in the middle of a round, from what `common` yielded on this worker.

        The parameters hold the model that all workers share when it is called; without `own` they keep it.
        """

    def forget(self) -> None:
        """Drops what is remembered from earlier rounds."""


class Communication(Settings, ABC):
    """Settings of a way to keep the workers together, and what is made of them for a model."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]

    trains_apart: ClassVar[bool]
    """True: workers make updates from their own rows; False: gradients are summed over the workers on every update."""

    state_bytes_per_parameter: ClassVar[int] = 0
    """What a process holds from round to round for each parameter of its part of the model."""

    @abstractmethod
    def start(self, parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> Rounds:
        """The communication of a run about to begin, in which all workers hold these parameters with equal values."""


def ring_bytes(payload: int, workers: int) -> int:
    """Bytes that a process sends to sum `payload` bytes over the workers in a ring, as gloo and NCCL do with many.

    Each sends (W - 1) / W of them twice: to sum a part on each, and to tell the others. Source: Patarasuk and Yuan
    2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, section 4.
    """
    return 2 * (workers - 1) * payload // workers


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the part of it that this process holds."""
    held: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(held.numel() * held.element_size())
