"""What a pull is: how strongly each weight is drawn back to the parent's after every step of the optimizer.

Formula: after the optimizer's step at learning rate r, with a the parent's weight, s the strength, f the importance:
    theta <- a + (theta - a) / (1 + r s f)
    which is the minimum over x of (x - theta)^2 / (2 r) + s f (x - a)^2 / 2: the exact step of a quadratic penalty.
Source: for a penalty apart from the gradient: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization",
    arXiv 1711.05101, section 2 (decay towards zero; here towards the parent); for the exact step: Parikh and Boyd 2014,
    "Proximal Algorithms", Foundations and Trends in Optimization 1(3), section 2.
Why not as a part of the loss: Adam divides the gradient by its own size and Muon drops it altogether, so that a penalty
    within the gradient would pull each weight by the noise of its gradient, count in the clipping, and enter the
    moments. Apart from the gradient the strength means one thing: per update the distance shrinks by r s f of itself,
    however the update is cut into micro-batches; being exact, it cannot overshoot, so that a huge one freezes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from perennial.core.settings import Settings

if TYPE_CHECKING:
    import torch

    SquaredGradients = Callable[[int], Mapping[str, torch.Tensor]]
    """Of so many rows: the mean over rows of the square of each weight's gradient, at the parent, by name."""


class Pull(Settings, ABC):
    """Settings of a pull; the strength, and how important each weight is."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]

    strength: Annotated[float, Field(gt=0, le=1e12)]
    """Of the pull, per unit of learning rate, as weight decay has it: an update at rate r takes back about the share
    r * strength of a weight's distance to the parent (of one of average importance)."""

    @property
    def mixture(self) -> dict[str, float | str]:
        """The data that importance is measured on, as a stage's mixture; empty when it needs none."""
        return {}

    @property
    def rows(self) -> int:
        """Rows of that data that it takes, forward and backward, at the beginning of the stage."""
        return 0

    @abstractmethod
    def importance(self, squared_gradients: SquaredGradients) -> Mapping[str, torch.Tensor] | None:
        """Factor on the strength for every weight, by the parameter's name; None: 1 for all."""
