"""Linear warm-up, then a decay with 1/sqrt(tokens) that needs no end, then an optional cooldown.

Formula: rate(t) = start + (peak - start) * t / W for t <= W, then final + (peak - final) * sqrt(W / t);
    over the last C tokens a straight line from the rate at T - C to final.
    t, W (warm-up), C (cooldown), T (horizon) in tokens.
Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 5.3 (final = 0, no cooldown);
    Li et al. 2025, "TiC-LM: A Web-Scale Benchmark for Time-Continual LLM Pretraining", arXiv 2504.02107 and its code
    (final and cooldown).
Limits: the warm-up is also the time scale of the decay, so it cannot be 0.
"""

from __future__ import annotations

import math
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
    glide,
    is_share,
    lengths,
    level,
)


class InverseSquareRoot(Schedule):
    """Independent of the horizon when the warm-up is given in tokens and no cooldown is asked for."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 1e-3, "warmup": "10K tokens"},
        {"peak": 1e-3, "warmup": "1%", "final": "3%", "cooldown": "20%"},
        {"peak": 1e-3, "start": 1e-4, "warmup": "10K tokens", "cooldown": "30K tokens"},
        {"peak": 1e-3, "warmup": "50%", "cooldown": "50%"},
    ]

    peak: Peak
    """The highest rate, at the end of the warm-up."""
    final: Level = 0.0
    """The rate that the decay tends to, and that a cooldown ends at."""
    start: Rate = 0.0
    """Rate at position 0."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak: tokens, or a share of the stage."""
    cooldown: Span = Amount(0.0, "share")
    """Length of the linear cooldown at the end: tokens, or a share of the stage."""

    @model_validator(mode="after")
    def _check(self) -> InverseSquareRoot:
        check_shares(warmup=self.warmup, cooldown=self.cooldown)
        check_order(final=level(self.final, self.peak), peak=self.peak)
        if not self.warmup.value:
            raise ValueError("warmup must be longer than 0: it is also the time scale of the decay")
        return self

    @property
    def needs_horizon(self) -> bool:
        """Only for a cooldown, or a warm-up given as a share."""
        return is_share(self.warmup) or self.cooldown.value > 0

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, decay, cooldown."""
        end = horizon if self.needs_horizon else math.inf
        warm, cool = lengths(end, warmup=self.warmup, cooldown=self.cooldown)
        final = level(self.final, self.peak)

        def decayed(tokens: float) -> float:
            return final + (self.peak - final) * math.sqrt(warm / tokens)

        turn = max(warm, end - cool) if cool else math.inf
        pieces = [glide("warmup", 0, warm, self.start, self.peak), Piece("decay", warm, turn, decayed)]
        if cool:
            pieces.append(glide("cooldown", turn, end, decayed(turn), final))
        return pieces
