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

from pydantic import field_validator

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
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

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"warmup": "2%"}, {"batch_warmup": "40%"}]
    USES_PEAK: ClassVar[bool] = True

    warmup: Share = Amount(0.01, "share")
    """Length of the rise. Ibrahim et al. (section 6.1) see no difference in the end between 0 and 2%."""

    batch_warmup: Share = Amount(0.0, "share")
    """First part of the update that is trained with half of the rows. Default: none, see `Differs`."""

    @field_validator("batch_warmup")
    @classmethod
    def _leaves_some(cls, share: Amount) -> Amount:
        if share.value >= 1:
            raise ValueError(f"{share}: must be below 100%; for fewer rows throughout set batch.sequences")
        return share

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        if not self.batch_warmup.value:
            return Planned([stage(UPDATE, str(situation.budget), situation.mixture(), schedule)], reasons)
        if situation.batch_rows < 2:
            raise UserError(f"{situation.option} rewarm: batch_warmup needs batches of two rows or more, not of one")
        schedule["start"] = situation.lineage.rate  # "parent" would be the stage before, in the second part
        budgets = situation.split(self.batch_warmup.value, 1 - self.batch_warmup.value)
        small, whole = ({"name": "part", "of": schedule, edge: str(self.batch_warmup)} for edge in ("last", "first"))
        rows = situation.batch_rows // 2
        stages = [
            stage("small-batches", budgets[0], situation.mixture(), small, sequences=rows),
            stage(UPDATE, budgets[1], situation.mixture(), whole),
        ]
        return Planned(stages, [*reasons, f"batch: {rows} rows in the first {self.batch_warmup}, then twice as many"])


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
