"""An infinite schedule: a trunk that any later update goes on from, and an anneal branch to deploy.

Formula: a parent on a trunk: its rate, constant, for 1 - a of the update. Any other parent: warm-up over 1% from its
    last rate to the peak of `rewarm`, cosine cooldown over 60% to 55% of that, then constant. The last share a (14%):
    an anneal, exponential, to a tenth of the trunk's rate. Shares are of the whole update.
Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv
    2403.08763, section 7; Singh et al. 2025, "Beyond Cosine Decay", arXiv 2503.02844.
Differs: trunk and anneal are two stages, so that the checkpoint between them stays and the next update starts there.
Limits: before the anneal the loss lies above that of a decayed model; compare annealed models only.
"""

from __future__ import annotations

from typing import Any, ClassVar

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


class Infinite(Continuation):
    """A trunk and a branch; the trunk's proportions are those of the paper."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"anneal": "20%", "cooldown": "50%"}]
    ON_TRUNK: ClassVar[bool] = True
    USES_PEAK: ClassVar[bool] = True

    anneal: Share = Amount(0.14, "share")
    """Share of the update that is the anneal branch."""
    warmup: Share = Amount(0.01, "share")
    """Share that is the rise, for a parent that stands on no trunk."""
    cooldown: Share = Amount(0.6, "share")
    """Share that is the fall to the constant rate, for a parent that stands on no trunk."""
    final: Share = Amount(0.1, "share")
    """Rate at the end of the anneal, as a share of the trunk's."""

    @model_validator(mode="after")
    def _check(self) -> Infinite:
        check_shares(anneal=self.anneal, warmup=self.warmup, cooldown=self.cooldown)
        return self

    def plan(self, situation: Situation) -> Planned:
        long = 1 - self.anneal.value
        lineage, mixture = situation.lineage, situation.mixture()
        warmup, cooldown = (Amount(share.value / long, "share") for share in (self.warmup, self.cooldown))
        going_on = trunk_rate(situation)
        if going_on is not None:
            rate = going_on
            trunk, why = along_trunk(situation, rate, warmup)
            reasons = [f"infinite: {why}"]
        else:
            peak, reasons = wanted_peak(situation)
            rate = 0.55 * peak
            trunk = {"name": "infinite", "start": "parent", "peak": peak, "constant": rate, "final": rate}
            trunk |= {"warmup": str(warmup), "cooldown": str(cooldown), "anneal": "0%"}
            reasons.append(f"infinite: from {left_at(lineage)}, to {peak:.3g}, then down to a trunk at {rate:.3g}")
        budgets = situation.split(long, self.anneal.value)
        fall = {"name": "anneal", "start": "parent", "final": str(self.final), "shape": "exponential"}
        reasons.append(
            f"anneal: the last {self.anneal} is a branch down to {self.final} of that; the checkpoint at the end of "
            f"stage '{TRUNK}' is kept, and the next update goes on from there"
        )
        return Planned([stage(TRUNK, budgets[0], mixture, trunk), stage(ANNEAL, budgets[1], mixture, fall)], reasons)
