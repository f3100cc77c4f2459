"""Warm-up, cooldown to a constant rate that can go on for ever, and an anneal when a model is wanted.

Formula: with n = t - W after the warm-up start + (peak - start) * t / W,
    cooldown, n <= C:  cosine: constant + (peak - constant) / 2 * (cos(pi * n / C) + 1)
        inverse_square_root: peak + (constant - peak) / h(1) * h(n / C), h(x) = 1 / sqrt(1 + timescale * x) - 1
    constant:  constant
    anneal, the last A tokens, a of them done:  constant * (final / constant)^(a / A)
    t, W (warm-up), C (cooldown), A (anneal) in tokens.
Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models",
    arXiv 2403.08763, section 7 and the authors' code; 405M: 3e-4, 1.65e-4, 3e-5. The defaults are its proportions.
Differs: every length here is a duration, and the constant phase is what the others leave. In the authors' code
    `constant_iters_percent = 0.85` is where the constant phase ends, counted after the warm-up: with warm-up 1% and
    cooldown 60% the phases are 1, 60, 25 and 14%, that is `anneal: 14%` here. Elsewhere (GPT-NeoX pull request 1194)
    the same setting is a duration (0.25), and the time scale defaults to 1, not 10.
Limits: before the anneal the loss lies above that of a decayed model; compare annealed models only.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

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
    is_share,
    lengths,
    level,
)

_TIMESCALE = 10.0  # the authors' default


class Infinite(Schedule):
    """Four phases; without an anneal, and with lengths in tokens, independent of the horizon.

    A later stage goes on from the constant phase with warmup and cooldown of 0%.
    """

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 3e-4},
        {"peak": 3e-4, "cooldown_shape": "inverse_square_root", "constant": 8e-5, "start": 3e-5},
        {"peak": 3e-4, "warmup": "10K tokens", "cooldown": "30K tokens", "anneal": "0%"},
        {"peak": 3e-4, "warmup": "0%", "cooldown": "0%", "anneal": "5K tokens"},
        {"peak": 3e-4, "warmup": "5%", "cooldown": "0%"},
        {"peak": 3e-4, "cooldown": "85%", "cooldown_shape": "inverse_square_root", "timescale": 1},
    ]

    peak: Peak
    """The highest rate, at the end of the warm-up."""
    constant: Level = Amount(0.55, "share")
    """Rate of the constant phase; by default midway between peak and final."""
    final: Level = Amount(0.1, "share")
    """Rate at the end of the anneal."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak (to constant without a cooldown): tokens, or a share of the stage."""
    cooldown: Span = Amount(0.6, "share")
    """Length of the fall from peak to constant: tokens, or a share of the stage."""
    cooldown_shape: Literal["cosine", "inverse_square_root"] = "cosine"
    """The curve of the cooldown."""
    timescale: float = Field(default=_TIMESCALE, gt=0, allow_inf_nan=False)
    """How steeply an inverse_square_root cooldown starts."""
    anneal: Span = Amount(0.14, "share")
    """Length of the exponential fall from constant to final at the end; 0% leaves the model at the constant rate."""

    @model_validator(mode="after")
    def _check(self) -> Infinite:
        check_shares(warmup=self.warmup, cooldown=self.cooldown, anneal=self.anneal)
        final = level(self.final, self.peak)
        check_order(final=final, constant=level(self.constant, self.peak), peak=self.peak)
        if self.anneal.value:
            check_reachable("the anneal, being", "exponential", final)
        if self.timescale != _TIMESCALE and self.cooldown_shape != "inverse_square_root":
            raise ValueError(f"timescale {self.timescale:g} has no use with cooldown_shape '{self.cooldown_shape}'")
        return self

    @property
    def needs_horizon(self) -> bool:
        """Only for an anneal, or for lengths given as shares."""
        return is_share(self.warmup, self.cooldown) or self.anneal.value > 0

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, cooldown, constant, anneal."""
        end = horizon if self.needs_horizon else math.inf
        warm, cool, anneal = lengths(end, warmup=self.warmup, cooldown=self.cooldown, anneal=self.anneal)
        constant = level(self.constant, self.peak)
        flat = warm + cool
        turn = max(flat, end - anneal) if anneal else math.inf
        pieces = [
            glide("warmup", 0, warm, self.start, self.peak if cool else constant),
            glide("cooldown", warm, flat, self.peak, constant, self.cooldown_shape, self.timescale),
            hold("constant", flat, turn, constant),
        ]
        if anneal:
            pieces.append(glide("anneal", turn, end, constant, level(self.final, self.peak), "exponential"))
        return pieces
