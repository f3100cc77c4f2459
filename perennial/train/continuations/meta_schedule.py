"""Autoregressive meta-schedule: the peaks of many updates fall along one cosine over all of them.

Formula: with S tokens spent before and N in this update, peak = low + (high - low) / 2 * (1 + cos(pi * S / (S + N))),
    high the highest rate that the model ever saw and low the one where it was left; then the rise and fall of `rewarm`
    from low to peak and back to low. For updates of equal size 100%, 50%, 25%, 15%, 10% ... of the way.
Source: Li et al. 2025, "TiC-LM: A Web-Scale Benchmark for Time-Continual LLM Pretraining", arXiv 2504.02107, section 4
    (cyclic cosine with an autoregressive schedule of the peaks) and the code published with it.
Differs: S counts all tokens since the first ancestor, its pre-training included, as lineage records them.
Limits: about 2.5 (N / S)^2 of the way for a small N: after ten updates of one size little is left to learn with.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from perennial.core.amounts import Amount, human
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, left_at, spent_on, stage


class MetaSchedule(Continuation):
    """One stage; only its peak knows how many there were before."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"warmup": "0%"}]

    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        lineage, amount = situation.lineage, situation.budget
        spent = spent_on(lineage)[amount.unit]
        low, high = lineage.rate, lineage.peak
        peak = low + (high - low) / 2 * (1 + math.cos(math.pi * spent / (spent + amount.value)))
        number = len(lineage.runs()) + (1 if lineage.origin else 0)
        schedule = {"name": "rewarm", "start": "parent", "peak": peak, "final": low, "warmup": str(self.warmup)}
        return Planned(
            [stage(UPDATE, str(amount), situation.mixture(), schedule)],
            [
                f"meta_schedule: update {number} of this model, {human(amount.value)} after "
                f"{human(spent, amount.unit)}: from {left_at(lineage)}, to {peak:.3g} and back; the peaks of all "
                f"updates lie on a cosine from {high:.3g}"
            ],
        )
