"""Linear warm-up to the peak, then half a cosine wave down to the final rate.

Formula: rate(t) = start + (peak - start) * t / W for t <= W,
    then final + (peak - final) / 2 * (cos(pi * (t - W) / (T - W)) + 1). t, W (warm-up), T (horizon) in tokens.
Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models",
    arXiv 2403.08763, Eq. 2 and section 5 (warm-up 1% of the stage, final = peak / 10).
Limits: every rate depends on the horizon; training on from the end needs a re-warm (`rewarm`), which costs a spike.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from perennial.core.amounts import Amount, Span
from perennial.schedules.base import (
    Level,
    Peak,
    Piece,
    Rate,
    Schedule,
    check_order,
    check_shares,
    level,
    warmup_then_decay,
)


class Cosine(Schedule):
    """The usual schedule of a model trained once."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 3e-4},
        {"peak": 3e-4, "final": 0, "warmup": "0%"},
        {"peak": 3e-4, "final": 1e-4, "warmup": "10K tokens"},
        {"peak": 3e-4, "warmup": "100%"},
    ]

    peak: Peak
    """The highest rate, at the end of the warm-up."""
    final: Level = Amount(0.1, "share")
    """Rate at the horizon."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak: tokens, or a share of the stage."""

    @model_validator(mode="after")
    def _check(self) -> Cosine:
        check_shares(warmup=self.warmup)
        check_order(final=level(self.final, self.peak), peak=self.peak)
        return self

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, then decay."""
        return warmup_then_decay(
            horizon,
            start=self.start,
            peak=self.peak,
            final=level(self.final, self.peak),
            warmup=self.warmup,
            shape="cosine",
        )
