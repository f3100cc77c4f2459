"""Linear warm-up to the peak, then a straight line down to the final rate.

Formula: rate(t) = start + (peak - start) * t / W for t <= W,
    then peak + (final - peak) * (t - W) / (T - W). t, W (warm-up), T (horizon) in tokens.
Source: Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    arXiv 1810.04805, appendix A.2.
Limits: every rate depends on the horizon, so a run cannot be prolonged without a jump or a re-warm.
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


class Linear(Schedule):
    """Up in a line, down in a line."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 1e-3},
        {"peak": 1e-3, "final": 1e-3, "warmup": "0%"},
        {"peak": 1e-3, "final": "10%", "start": 1e-4, "warmup": "100%"},
    ]

    peak: Peak
    """The highest rate, at the end of the warm-up."""
    final: Level = 0.0
    """Rate at the horizon."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak: tokens, or a share of the stage."""

    @model_validator(mode="after")
    def _check(self) -> Linear:
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
            shape="linear",
        )
