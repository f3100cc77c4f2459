"""WSD-S: from a decayed checkpoint straight back to the trunk's rate, and down again.

Formula: per cycle constant at the trunk's rate, no warm-up, then a decay over the last 10%, a straight line in
    1 / rate, to a tenth. The trunk's rate is the one before the parent's decay, or where a parent on a trunk stands;
    for any other parent the peak of `rewarm`.
Source: Wen et al. 2024, "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape Perspective",
    arXiv 2410.05192 (WSD-Simplified).
Limits: needs the optimizer's state of the parent; the jump costs a spike, which the stable stretch has to make up for.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from perennial.core.amounts import Amount
from perennial.schedules.base import check_shares
from perennial.train.continuations.base import (
    ANNEAL,
    TRUNK,
    Continuation,
    Planned,
    Share,
    Situation,
    stage,
    trunk_rate,
    wanted_peak,
)


class WSDS(Continuation):
    """Cycles of a stable stretch and a decay, each with a checkpoint that can be deployed."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"cycles": 3, "decay": "20%"}]
    USES_PEAK: ClassVar[bool] = True

    cycles: int = Field(default=1, ge=1)
    """Cycles of equal length in the update."""
    decay: Share = Amount(0.1, "share")
    """Share of each cycle that is its decay."""
    final: Share = Amount(0.1, "share")
    """Rate at the end of each cycle, as a share of the trunk's."""

    @model_validator(mode="after")
    def _check(self) -> WSDS:
        check_shares(decay=self.decay)
        return self

    def plan(self, situation: Situation) -> Planned:
        going_on = trunk_rate(situation)
        if going_on is not None:
            rate, reasons = going_on, [f"wsd_s: straight to {going_on:.3g}, the rate of the parent's trunk, no warm-up"]
        else:
            rate, reasons = wanted_peak(situation)
            reasons.append(f"wsd_s: straight to {rate:.3g}, no warm-up")
        shares = [(1 - self.decay.value) / self.cycles, self.decay.value / self.cycles] * self.cycles
        fall = {"name": "anneal", "start": "parent", "final": str(self.final), "shape": "inverse"}
        stages = []
        for number, budget in enumerate(situation.split(*shares)):
            name, schedule = (ANNEAL, fall) if number % 2 else (TRUNK, {"name": "constant", "peak": rate})
            label = name if self.cycles == 1 else f"{name}-{number // 2 + 1}"
            stages.append(stage(label, budget, situation.mixture(), schedule))
        reasons.append(f"decay: the last {self.decay} of each cycle, to {self.final} of the trunk's rate")
        return Planned(stages, reasons)
