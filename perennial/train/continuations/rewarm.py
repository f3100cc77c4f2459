"""Re-warm the learning rate, re-decay it and replay a share of the old data: the default.

Formula: a `rewarm` schedule over the whole update: from the parent's last rate up to the peak, then a cosine down to
    the parent's last rate. peak = parent's peak x (update / parent)^0.7, at most the parent's (see `base`); when that
    is no more than the parent was left at, there is nothing to raise: the rate decays from there to a tenth of it.
Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv
    2403.08763, sections 4 and 6; Gupta et al. 2023, "How to (re)warm your model?", arXiv 2308.04014.
Differs: they re-warm to the parent's own peak, which suits an update as large as the parent's training.
Limits: the loss on old and new data rises for a while after a re-warm; judge at the end of the update.
"""

from __future__ import annotations

from typing import Any, ClassVar

from perennial.core.amounts import Amount
from perennial.train import origin
from perennial.train.continuations.base import (
    UPDATE,
    Continuation,
    Planned,
    Share,
    Situation,
    left_at,
    stage,
    wanted_peak,
)


class Rewarm(Continuation):
    """One stage with a rise and a fall of its own."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"warmup": "2%"}]
    USES_PEAK: ClassVar[bool] = True

    warmup: Share = Amount(0.01, "share")
    """Length of the rise. Ibrahim et al. (section 6.1) see no difference in the end between 0 and 2%."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        return Planned([stage(UPDATE, str(situation.budget), situation.mixture(), schedule)], reasons)


def rise_and_fall(situation: Situation, warmup: Amount) -> tuple[dict[str, Any], list[str]]:
    """The schedule from where the parent was left, up to the peak and down again, with the reasons."""
    lineage = situation.lineage
    peak, reasons = wanted_peak(situation)
    final = min(lineage.rate, peak)
    if final == peak:
        final = origin.rounded(origin.FINAL_SHARE * peak)
        is_small = situation.peak is None and lineage.rate < lineage.peak
        why = origin.WHY_NOT_REWARM if is_small else "that is no lower than the peak"
        reasons.append(f"start at {left_at(lineage)}; no re-warming: {why}; decay from {peak:.3g} to {final:.3g}")
    else:
        reasons.append(f"re-warm from {left_at(lineage)}, to {peak:.3g}; then decay to {final:.3g}")
    return {"name": "rewarm", "start": "parent", "peak": peak, "final": final, "warmup": str(warmup)}, reasons
