"""From where the rate stands down to a final rate over the whole stage: a decay branch off a trunk.

Formula: with s = t / T, start * (1 - g(s)) + final * g(s), where
    sqrt    g = sqrt(s), so that the rate is final + (start - final) * (1 - sqrt(s))
    linear  g = s
    cosine  g = (1 - cos(pi * s)) / 2
    exponential  start * (final / start)^s
    inverse      1 / (1/start + (1/final - 1/start) * s)
    t, T (horizon) in tokens.
Source: sqrt and linear: Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", arXiv 2405.18392, section 3; exponential: Ibrahim et al. 2024, arXiv 2403.08763, section 7 (the
    anneal of an infinite schedule); inverse: Wen et al. 2024, arXiv 2410.05192.
Limits: a stage with this schedule counts as a branch: lineage tells by it from where the trunk can go on.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.schedules.base import Level, Piece, Rate, Schedule, check_order, check_reachable, glide, level


class Anneal(Schedule):
    """The last stretch of a trunk that is wanted as a model."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"start": 1e-3},
        {"start": 1e-3, "shape": "linear", "final": "10%"},
        {"start": 1e-3, "shape": "cosine", "final": 1e-3},
        {"start": 1e-3, "shape": "exponential", "final": 1e-5},
        {"start": 1e-3, "shape": "inverse", "final": "10%"},
    ]

    start: Rate
    """Rate at position 0: where the trunk stands."""
    final: Level = Amount(0.0, "share")
    """Rate at the horizon; a share is one of `start`."""
    shape: Literal["sqrt", "linear", "cosine", "exponential", "inverse"] = "sqrt"
    """The curve; sqrt (1 - sqrt) came out best in Haegele et al., linear close to it."""

    @model_validator(mode="after")
    def _check(self) -> Anneal:
        check_reachable("shape", self.shape, level(self.final, 1.0))
        if not isinstance(self.final, Amount) and self.start > 0:
            check_order(final=self.final, start=self.start)
        elif isinstance(self.final, Amount) and self.final.value > 1:
            raise ValueError(f"final {self.final}: an anneal goes down, so it ends at no more than 100%")
        return self

    def pieces(self, horizon: float) -> list[Piece]:
        """One decay."""
        if self.start == 0:
            raise UserError("the anneal starts at a learning rate of 0, where nothing is left to anneal")
        return [glide("decay", 0, horizon, self.start, level(self.final, self.start), self.shape)]
