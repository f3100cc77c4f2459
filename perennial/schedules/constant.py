"""One rate throughout, reached by an optional linear warm-up.

Formula: rate(t) = start + (peak - start) * t / W for t <= W, then peak. t, W in tokens.
Source: Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
    arXiv 2405.18392, section 3 (there with a cooldown at the end: that is `wsd`).
Limits: the loss stays above that of an annealed model; decay before comparing or deploying.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import model_validator

from perennial.core.amounts import Amount, Span
from perennial.schedules.base import Peak, Piece, Rate, Schedule, check_shares, glide, hold, is_share, lengths


class Constant(Schedule):
    """A flat rate; independent of the horizon unless the warm-up is a share of it."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 3e-5},
        {"peak": 1e-3, "warmup": "20K tokens"},
        {"peak": 1e-3, "start": 1e-4, "warmup": "5%"},
        {"peak": 1e-3, "warmup": "100%"},
    ]

    peak: Peak
    """The rate."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.0, "share")
    """Length of the linear rise from start to peak: tokens, or a share of the stage."""

    @model_validator(mode="after")
    def _check(self) -> Constant:
        check_shares(warmup=self.warmup)
        return self

    @property
    def needs_horizon(self) -> bool:
        """Only for a warm-up given as a share."""
        return is_share(self.warmup)

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, then the rest."""
        (warm,) = lengths(horizon if self.needs_horizon else math.inf, warmup=self.warmup)
        return [glide("warmup", 0, warm, self.start, self.peak), hold("constant", warm, math.inf, self.peak)]
