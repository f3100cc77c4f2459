"""Draw every weight back to the parent's alike.

Formula: importance 1 for every weight (see `pulls.base` for the step).
Source: Li, Grandvalet, Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", arXiv
    1802.01483, section 3 (L2-SP: a penalty on the distance to the starting point).
Differs: apart from the gradient and exact (`pulls.base`), and on all weights, of which none is new here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from perennial.pulls.base import Pull

if TYPE_CHECKING:
    import torch

    from perennial.pulls.base import SquaredGradients


class L2(Pull):
    """Nothing to measure, and the parent's weights in memory."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{"strength": 0.5}, {"strength": 1e9}]

    def importance(self, squared_gradients: SquaredGradients) -> Mapping[str, torch.Tensor] | None:
        """The same for all."""
        return None
