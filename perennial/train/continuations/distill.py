"""Learn the new text and what the parent would have predicted: for when the old data are gone.

Formula: the schedule of `rewarm`; objective (1 - w) x next-token loss + w x cross entropy to the parent's predictions,
    with w = 0.5 and temperature 1 (objective `distillation`), on the new text and on whatever old or self-generated
    text is replayed.
Source: Li and Hoiem 2016, "Learning without Forgetting", arXiv 1606.09282, section 3; Lee et al. 2022,
    "Self-Distillation for Further Pre-training of Transformers", arXiv 2210.02871, section 4.
Limits: on new text alone the parent's predictions hold back what is to be learned as well; with text of the parent's
    own (`perennial generate --out`, then --replay self=FILE) they say what is to be kept. A forward pass more per
    update, or per row of old text. Beside replay of what the parent really saw it did not pay (LOG.md).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall


class Distill(Continuation):
    """One stage with the parent as its teacher."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"weight": 0.2, "temperature": 2.0, "rows": "old"}]
    USES_PEAK: ClassVar[bool] = True

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the parent in the loss."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1 the unlikely tokens count for more."""
    rows: Literal["all", "old"] = "all"
    """Whether the parent has a part in all rows, or in those of old (or self-generated) text alone."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        made = stage(UPDATE, str(situation.budget), situation.mixture(), schedule)
        made["objective"] = {"name": "distillation", "weight": self.weight, "temperature": self.temperature}
        where = ""
        if self.rows == "old":
            if not situation.replay:
                raise UserError(
                    f"{situation.option} distill: rows 'old': nothing is replayed; add --replay, or take 'all'"
                )
            made["objective"]["rows"] = list(situation.stand_ins) or "replay"
            where = " on the rows of old text"
        reason = f"distill: {self.weight:g} of the loss{where} is to predict what the parent does"
        return Planned([made], [*reasons, reason])
