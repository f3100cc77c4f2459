"""What an objective is: sums over the counted tokens of a batch, divided once by the caller.

A model is called as `model(inputs, segments)` and returns its last hidden states (B, T, D); `model.head_weight` is the
(V, D) tensor that turns them into logits. Where logits are made in another way (capped, scaled, with a bias),
`head_weight` is None and the call returns the logits (B, T, V) themselves. A batch has `inputs` and `targets` (B, T)
int64 and `segments` (B, T) int32, or None.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from perennial.core.settings import Settings

if TYPE_CHECKING:
    import torch

    class LanguageModel(Protocol):
        """The part of a model that an objective uses."""

        @property
        def head_weight(self) -> torch.Tensor | None:
            """(V, D): logits = hidden @ head_weight.T. None: the call returns logits."""

        def __call__(self, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
            """Token ids (B, T), and which document each belongs to, to hidden states (B, T, D) or logits (B, T, V)."""

    class TensorBatch(Protocol):
        """Token ids in and out; targets of IGNORED are not counted."""

        @property
        def inputs(self) -> torch.Tensor:
            """(B, T) int64."""

        @property
        def targets(self) -> torch.Tensor:
            """(B, T) int64."""

        @property
        def segments(self) -> torch.Tensor | None:
            """(B, T) document numbers, or None when attention may cross documents."""


IGNORED = -100
"""The target id of a position that is not trained on."""


@dataclass(frozen=True)
class LossSum:
    """Sums over a batch's counted tokens, each a scalar tensor, so that nothing waits for the device."""

    total: torch.Tensor
    """What to differentiate: nats plus whatever the objective adds."""
    nats: torch.Tensor
    """The loss to report, detached: -ln p(target), nothing added."""
    count: torch.Tensor
    """How many tokens were counted, int64."""


class Objective(Settings, ABC):
    """Settings of a loss, and its sums for a model and a batch."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]

    @abstractmethod
    def loss(self, model: LanguageModel, batch: TensorBatch) -> LossSum:
        """The sums to train on; `total` has gradients."""

    @abstractmethod
    def evaluate(self, model: LanguageModel, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of nats, count) without gradients."""
