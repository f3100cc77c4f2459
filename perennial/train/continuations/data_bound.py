"""Little new text for the budget: many passes over it, made safe by a strong weight decay.

Formula: weight decay = 1.07 x parameters / training tokens of the new text, between 0.1 and 3.2; passes as many as the
    budget asks for, at most 16; the schedule of `rewarm`.
Source: Kim, Kotha, Liang and Hashimoto 2025, "Pre-training under infinite compute", arXiv 2509.14786: on 200M tokens
    the best weight decay was 0.8, 1.6, 3.2 and 3.2 for 150M, 300M, 600M and 1.4B parameters, with 8 or 16 passes.
Differs: they train from random weights; the law is one line through their first three points, and its bounds are their
    smallest and largest value. For continued pre-training of a 3B model at 3e-5 they kept 0.1.
Limits: decay pulls towards zero, not towards the parent: at a high rate over many updates it also costs old knowledge.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall

DECAY_PER_RATIO = 1.07
"""0.8 at 150M parameters for 200M tokens: 0.8 / 0.75."""
DECAY_BOUNDS = (0.1, 3.2)
MOST_EPOCHS = 16.0
"""The most passes that were best for one of their models."""


class DataBound(Continuation):
    """One stage of many passes."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"weight_decay": 0.8, "max_epochs": 32}]
    USES_PEAK: ClassVar[bool] = True

    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the matrices; None: by the law."""
    max_epochs: float = Field(default=MOST_EPOCHS, gt=0)
    """Most passes over the new text; more is an error."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        if self.weight_decay is None and situation.fresh_tokens is None:
            decay, why = DECAY_BOUNDS[0], "the new text is not counted yet"
        elif self.weight_decay is None:
            assert situation.fresh_tokens is not None
            decay = strong_decay(situation.parameters, situation.fresh_tokens)
            why = f"{DECAY_PER_RATIO} x parameters / tokens of new text, within {DECAY_BOUNDS}"
        else:
            decay, why = self.weight_decay, "asked for"
        epochs = situation.epochs
        if epochs is not None and epochs > self.max_epochs:
            most = f"{int(situation.tokens * self.max_epochs / epochs)} tokens"
            names = " and ".join(f"'{name}'" for name in situation.fresh)
            of = f"the shortest of {names}" if len(situation.fresh) > 1 else names
            raise UserError(
                f"--tokens {situation.budget}: {epochs:.3g} passes over {of}, of which at most {self.max_epochs:g} are "
                f"worth it (recipe data_bound); lower it to {most}, give more text, or raise its max_epochs with "
                f"{situation.option} '{{name: data_bound, max_epochs: {math.ceil(epochs):.3g}}}'"
            )
        made = stage(UPDATE, str(situation.budget), situation.mixture(), schedule)
        made |= {"optimizer": with_decay(situation.optimizer, decay), "max_epochs": self.max_epochs}
        passes = "" if epochs is None else f", for {epochs:.2g} passes over the new text"
        return Planned([made], [*reasons, f"weight decay {decay:.3g}: {why}{passes}"])


def strong_decay(parameters: float, tokens: float) -> float:
    """The weight decay for so many parameters on so many tokens of different text."""
    low, high = DECAY_BOUNDS
    return float(f"{min(high, max(low, DECAY_PER_RATIO * parameters / tokens)):.3g}")


def with_decay(optimizer: Any, decay: float) -> dict[str, Any]:
    """The optimizer with another weight decay."""
    return {**({"name": optimizer} if isinstance(optimizer, str) else optimizer), "weight_decay": decay}
