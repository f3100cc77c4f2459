"""Warm-up, stable, decay: a stable trunk that the next update goes on from, and a decay branch.

Formula: a parent on a trunk: its rate, constant. Any other: linear warm-up over 1% to the peak of `rewarm`, then
    constant. The last 20%: a decay branch (1 - sqrt) to a tenth of the trunk's rate.
Source: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4; Haegele et al. 2024, arXiv 2405.18392, section 3
    (1 - sqrt, 10 to 20%).
Limits: the checkpoint at the end of the trunk has to be kept; it is, as the end of a stage.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from perennial.core.amounts import Amount
from perennial.schedules.base import check_shares
from perennial.train.continuations.base import (
    ANNEAL,
    TRUNK,
    Continuation,
    Planned,
    Share,
    Situation,
    along_trunk,
    left_at,
    stage,
    trunk_rate,
    wanted_peak,
)


class WSD(Continuation):
    """A trunk and a branch."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"decay": "10%", "shape": "linear", "final": "0%"}]
    ON_TRUNK: ClassVar[bool] = True
    USES_PEAK: ClassVar[bool] = True

    decay: Share = Amount(0.2, "share")
    """Share of the update that is the decay. 10% of a long run is enough (Hu et al.), 2.5% is not."""
    warmup: Share = Amount(0.01, "share")
    """Share that is the rise, for a parent that stands on no trunk."""
    final: Share = Amount(0.1, "share")
    """Rate at the end of the decay, as a share of the trunk's."""
    shape: Literal["sqrt", "linear"] = "sqrt"
    """The curve of the decay."""

    @model_validator(mode="after")
    def _check(self) -> WSD:
        check_shares(decay=self.decay, warmup=self.warmup)
        return self

    def plan(self, situation: Situation) -> Planned:
        lineage, mixture = situation.lineage, situation.mixture()
        long = 1 - self.decay.value
        warmup = Amount(self.warmup.value / long, "share")
        going_on = trunk_rate(situation)
        if going_on is not None:
            rate = going_on
            trunk, why = along_trunk(situation, rate, warmup)
            reasons = [f"wsd: {why}"]
        else:
            rate, reasons = wanted_peak(situation)
            trunk = {"name": "wsd", "start": "parent", "peak": rate, "warmup": str(warmup), "decay": "0%"}
            reasons.append(f"wsd: from {left_at(lineage)}, up to a trunk at {rate:.3g}")
        fall = {"name": "anneal", "start": "parent", "final": str(self.final), "shape": self.shape}
        reasons.append(
            f"decay: the last {self.decay} is a branch down to {self.final} of that; the checkpoint at the end of "
            f"stage '{TRUNK}' is kept, and the next update goes on from there"
        )
        budgets = situation.split(long, self.decay.value)
        return Planned([stage(TRUNK, budgets[0], mixture, trunk), stage(ANNEAL, budgets[1], mixture, fall)], reasons)
