"""From the parent's last rate up to a new peak, then down a cosine: what `continue` does by default.

Formula: the one of `cosine` with `start` = the rate at which the parent ended:
    rate(t) = start + (peak - start) * t / W for t <= W,
    then final + (peak - final) / 2 * (cos(pi * (t - W) / (T - W)) + 1). t, W (warm-up), T (horizon) in tokens.
Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models",
    arXiv 2403.08763, sections 4.1 and 6.1: each new data set gets warm-up and decay of its own, with T = its budget.
Differs: the rise of the paper starts at 0; the released code, where it repeats a cycle, starts at the final rate.
Limits: the peak should shrink with the update: the parent's own peak suits an update of about the parent's size, a far
    smaller one a far smaller peak. The loss on old and new data rises for a while after a re-warm; judge at the end.
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


class Rewarm(Schedule):
    """A continuation's rise and fall; from a start above the peak, the first phase leads down to it."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"start": 3e-5, "peak": 3e-4},
        {"start": 0, "peak": 3e-4, "warmup": "10K tokens", "final": 0},
        {"start": 3e-4, "peak": 3e-4, "warmup": "0%"},
        {"start": 1e-3, "peak": 3e-4, "warmup": "2%"},
    ]

    start: Rate
    """The rate at which the parent ended."""
    peak: Peak
    """The rate to re-warm to."""
    final: Level = Amount(0.1, "share")
    """Rate at the horizon."""
    warmup: Span = Amount(0.01, "share")
    """Length of the way from start to peak: tokens, or a share of the stage. 0 jumps to the peak at once."""

    @model_validator(mode="after")
    def _check(self) -> Rewarm:
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
