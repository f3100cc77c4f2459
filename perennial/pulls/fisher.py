"""Draw each weight back to the parent's by how much the old data depend on it (EWC).

Formula: F_i = mean over rows of (d L / d theta_i)^2 at the parent, L the row's mean nats per token on old data;
    importance_i = F_i / (mean of F over all weights), so that the strength compares with that of `l2`.
Source: Kirkpatrick et al. 2016, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, section 2
    (diagonal Fisher information as the precision of the penalty); as a baseline of continual pre-training: Li et al.
    2025, "TiC-LM: A Web-Scale Benchmark for Time-Continual LLM Pretraining", arXiv 2504.02107, section 4 (100 batches).
Differs: one gradient per row instead of per token or per batch; the empirical Fisher (of the text as it is, not of the
    model's own samples); scaled to a mean of 1; apart from the gradient and exact (`pulls.base`).
Limits: measured at the parent and never again; a diagonal; it costs `rows` rows of forward and backward at the start of
    a stage, and once more whenever a run is resumed, because it is measured again instead of being stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.pulls.base import Pull

if TYPE_CHECKING:
    import torch

    from perennial.pulls.base import SquaredGradients


class Fisher(Pull):
    """The parent's weights in memory, and a number of importance beside each."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"strength": 0.5},
        {"strength": 3.0, "samples": 4, "data": {"old": "100%"}},
    ]

    samples: Annotated[int, Field(ge=1)] = 256
    """Rows that the Fisher information is measured on."""
    data: dict[str, float | str] = {"replay": "100%"}
    """The mixture that they are drawn from: what the parent consumed, or corpora of the recipe that stand for it."""

    @field_validator("data")
    @classmethod
    def _some(cls, data: dict[str, float | str]) -> dict[str, float | str]:
        if not data:
            raise ValueError("name a corpus of old data, or 'replay'")
        for share in data.values():
            if isinstance(share, str):
                parse(share, ("share",))
        return data

    @property
    def mixture(self) -> dict[str, float | str]:
        """The old data."""
        return self.data

    @property
    def rows(self) -> int:
        """All samples."""
        return self.samples

    def importance(self, squared_gradients: SquaredGradients) -> Mapping[str, torch.Tensor] | None:
        """The diagonal of the Fisher information, divided by its mean."""
        squares = squared_gradients(self.samples)
        count = sum(square.numel() for square in squares.values())
        mean = sum(float(square.double().sum()) for square in squares.values()) / count
        if not mean > 0:
            raise UserError("pull fisher: the old data give no gradient at the parent, so there is nothing to weigh by")
        return {name: square.div_(mean) for name, square in squares.items()}
