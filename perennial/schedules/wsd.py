"""Warm-up, a long stable stretch at the peak, then a short decay to the final rate.

Formula: rate(t) = start + (peak - start) * t / W for t <= W; peak until T - D; then, with s = (t - (T - D)) / D,
    linear       peak + (final - peak) * s
    sqrt         final + (peak - final) * (1 - sqrt(s))
    exponential  peak * (final / peak)^s
    inverse      1 / (1/peak + (1/final - 1/peak) * s), a straight line in 1/rate.
    t, W (warm-up), D (decay), T (horizon) in tokens.
Source: Hu et al. 2024, "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    arXiv 2404.06395, section 4 (stable then decay; a decay of 10% is enough, 2.5% is not; exponential);
    sqrt and linear: Haegele et al. 2024, arXiv 2405.18392, section 3; inverse: Wen et al. 2024, arXiv 2410.05192.
Differs: MiniCPM gives its exponential decay as a half-life in steps; here it is the one that ends at `final`.
Limits: before the decay the loss lies above that of a cosine; compare decayed models only. Continue from the
    checkpoint before the decay at the peak, or from the decayed one (`wsd_s`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from perennial.core.amounts import Amount, Span
from perennial.schedules.base import (
    Level,
    Peak,
    Piece,
    Rate,
    Schedule,
    check_order,
    check_reachable,
    check_shares,
    glide,
    hold,
    lengths,
    level,
)


class WSD(Schedule):
    """The schedule that lets the length of a run be decided late: only the decay needs to know the end."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 1e-3},
        {"peak": 1e-3, "final": 0, "warmup": "10K tokens", "decay": "20%", "decay_shape": "linear"},
        {"peak": 1e-3, "start": 1e-4, "decay": "15K tokens", "decay_shape": "exponential"},
        {"peak": 1e-3, "warmup": "30%", "decay": "70%", "decay_shape": "inverse"},
        {"peak": 1e-3, "warmup": "0%", "decay": "0%"},
        {"peak": 1e-3, "warmup": "0%", "decay": "100%"},
    ]

    peak: Peak
    """The rate of the stable stretch."""
    final: Level = Amount(0.1, "share")
    """Rate at the horizon."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak: tokens, or a share of the stage."""
    decay: Span = Amount(0.1, "share")
    """Length of the decay at the end: tokens, or a share of the stage."""
    decay_shape: Literal["linear", "exponential", "sqrt", "inverse"] = "sqrt"
    """The curve of the decay; sqrt (1 - sqrt) came out best in Haegele et al."""

    @model_validator(mode="after")
    def _check(self) -> WSD:
        check_shares(warmup=self.warmup, decay=self.decay)
        check_order(final=level(self.final, self.peak), peak=self.peak)
        check_reachable("decay_shape", self.decay_shape, level(self.final, self.peak))
        return self

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, stable, decay."""
        warm, decay = lengths(horizon, warmup=self.warmup, decay=self.decay)
        turn = max(warm, horizon - decay)
        return [
            glide("warmup", 0, warm, self.start, self.peak),
            hold("stable", warm, turn, self.peak),
            glide("decay", turn, horizon, self.peak, level(self.final, self.peak), self.decay_shape),
        ]
