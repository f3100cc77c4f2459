"""Train, then average with the parent: what was forgotten comes back, some of what was learned goes.

Formula: the stages of `rewarm`; then w = (1 - a) x parent + a x child, a of 0, 0.1, ..., 1 with the lowest mean of the
    validation losses on old and new data, written to RUN/averaged. Without old data to measure, a = 0.5.
Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3.
Differs: the loss that decides is the mean of old and new; `perennial merge --prefer` weighs them otherwise.
Limits: the average holds no optimizer state. Ibrahim et al. 2024 (arXiv 2403.08763) find merging behind replay.
"""

from __future__ import annotations

from typing import Any, ClassVar

from perennial.core.amounts import Amount
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall


class Average(Continuation):
    """One stage, and a line search after it."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}]
    USES_PEAK: ClassVar[bool] = True
    AVERAGES: ClassVar[bool] = True

    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        made = stage(UPDATE, str(situation.budget), situation.mixture(), schedule)
        return Planned([made], [*reasons, "average: the finished run is averaged with its parent, into RUN/averaged"])
