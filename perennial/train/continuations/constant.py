"""Stay at the learning rate where the parent was left: plain continued training.

Source: the baseline of Ibrahim et al. 2024, arXiv 2403.08763, section 6.2 (constant at the final rate, no warm-up): it
    forgets least of all rates and learns least.
Limits: on a trunk it leaves a model that is not decayed; anneal before comparing or deploying it.
"""

from __future__ import annotations

from perennial.train.continuations.base import UPDATE, Continuation, Planned, Situation, check_not_zero, stage


class Constant(Continuation):
    """One stage at one rate."""

    def plan(self, situation: Situation) -> Planned:
        check_not_zero(situation, "constant")
        rate = situation.lineage.rate
        reason = f"constant learning rate {rate:.3g}: where the parent was left"
        schedule = {"name": "constant", "peak": rate}
        return Planned([stage(UPDATE, str(situation.budget), situation.mixture(), schedule)], [reason])
