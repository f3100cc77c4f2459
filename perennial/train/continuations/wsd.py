"""Warm-up, stable, decay: a stable trunk that the next update goes on from, and a decay branch.

Formula: a parent on a trunk: its rate, constant. Any other: linear warm-up over 1% to the peak of `rewarm`, then
    constant. The last part d: a decay branch (1 - sqrt) to a tenth of the trunk's rate; d = 8 / sqrt(steps of the
    update), at least 20% and at most 40%.
Source: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4; Haegele et al. 2024, arXiv 2405.18392, section 3
    (1 - sqrt, 10 to 20%; the shorter the run, the longer the share).
Limits: the checkpoint at the end of the trunk has to be kept; it is, as the end of a stage. What is read during the
    decay the trunk has not seen: in a stream of many short updates that is a loss (`infinite` decays for 14%).
"""

from __future__ import annotations

import math
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

LEAST_DECAY, MOST_DECAY, DECAY_STEPS = 0.2, 0.4, 8.0
"""Bounds of the decay's share, and what its share is times the root of the update's steps.

Assumption: 20% is enough of a long run (Haegele et al.). Of 400 steps 40 and 60%, to 0, ended 0.4% below 20% in the
mean of old and new loss, and 0.9% below the 14% of `infinite` (`benchmarks/bar_search.py`, two seeds, one shift). The
root in between is a guess.
"""


class WSD(Continuation):
    """A trunk and a branch."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"decay": "10%", "shape": "linear", "final": "0%"}]
    ON_TRUNK: ClassVar[bool] = True
    USES_PEAK: ClassVar[bool] = True

    decay: Share | None = None
    """Share of the update that is the decay; None: 20% of a long update, up to 40% of a short one."""
    warmup: Share = Amount(0.01, "share")
    """Share that is the rise, for a parent that stands on no trunk."""
    final: Share = Amount(0.1, "share")
    """Rate at the end of the decay, as a share of the trunk's."""
    shape: Literal["sqrt", "linear"] = "sqrt"
    """The curve of the decay."""

    @model_validator(mode="after")
    def _check(self) -> WSD:
        check_shares(warmup=self.warmup, **({} if self.decay is None else {"decay": self.decay}))
        return self

    def plan(self, situation: Situation) -> Planned:
        lineage, mixture = situation.lineage, situation.mixture()
        decay = self.decay or Amount(decay_share(situation.tokens / situation.batch_tokens), "share")
        long = 1 - decay.value
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
            f"decay: the last {decay} is a branch down to {self.final} of that; the checkpoint at the end of "
            f"stage '{TRUNK}' is kept, and the next update goes on from there"
        )
        budgets = situation.split(long, decay.value)
        return Planned([stage(TRUNK, budgets[0], mixture, trunk), stage(ANNEAL, budgets[1], mixture, fall)], reasons)


def decay_share(steps: float) -> float:
    """The share of an update of so many steps that its decay takes, in whole percents; 20% where they are not known."""
    if math.isnan(steps):
        return LEAST_DECAY
    return round(min(MOST_DECAY, max(LEAST_DECAY, DECAY_STEPS / math.sqrt(steps))), 2)
