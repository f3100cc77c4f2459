"""Train once over the new text and stop: no token is seen twice.

Formula: budget = min(what was asked for, training tokens of the new text / (1 - replay)); the schedule of `rewarm`.
Source: Komatsuzaki 2019, "One Epoch Is All You Need", arXiv 1906.06669: one pass over much data with a model that fits
    the budget, and no regularisation, instead of many passes.
Differs: the model is given, so it is the budget that follows from the data; dropout is never used here.
Limits: where text is short, up to four passes are worth nearly as much as new text (Muennighoff et al. 2023, arXiv
    2305.16264): then this stops too early.
"""

from __future__ import annotations

from typing import Any, ClassVar

from perennial.core.amounts import Amount, human
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall


class OneEpoch(Continuation):
    """One stage, at most as long as the new text."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}]
    USES_PEAK: ClassVar[bool] = True

    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        budget, reason = situation.budget, f"one_epoch: {situation.budget} are no more than one pass over the new text"
        if situation.fresh_tokens is None:
            reason = "one_epoch: the new text is not counted yet"
        elif situation.epochs is not None and situation.epochs > 1:
            asked, share = situation.budget, 1 / situation.epochs
            updates = int(situation.tokens * share // situation.batch_tokens) if asked.unit == "tokens" else 0
            value = max(1, updates) * situation.batch_tokens if asked.unit == "tokens" else asked.value * share
            budget = Amount(float(value), asked.unit)
            reason = (
                f"one_epoch: one pass over the new text ({human(situation.fresh_tokens, 'tokens')}) is {budget}, less "
                f"than the {asked} asked for"
            )
        return Planned([stage(UPDATE, str(budget), situation.mixture(), schedule)], [*reasons, reason])
