"""Several passes over the likeliest part of the new text, mixed with old data (stability gap).

Formula: of the new text the documents of lowest perplexity under the parent are kept, as many as make budget x (1 -
    replay) / epochs tokens; epochs = 4; replay at least 18%. The schedule of `rewarm`.
Source: Guo et al. 2024, "Efficient Continual Pre-training by Mitigating the Stability Gap", arXiv 2406.14833, section
    4: strategies I (a subset for several epochs), II (of the lowest perplexity) and III (the mixture of pre-training,
    of which 82% became new text).
Differs: they rank by an n-gram model of reference text; here the parent ranks. The 18% of old data are replay of what
    the parent consumed.
Limits: a subset that is too small is learned by heart (theirs: 1B tokens of 50B); the rest of the new text is never
    seen.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall


class StabilityGap(Continuation):
    """One stage on a part of the new text."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"epochs": 2, "replay": "30%"}]
    USES_PEAK: ClassVar[bool] = True
    SELECTS: ClassVar[bool] = True

    epochs: float = Field(default=4.0, ge=1)
    """Passes over the part that is kept."""
    replay: Share = Amount(0.18, "share")
    """Least share of old data, where there are any."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        replay = self._replay(situation)
        made = stage(UPDATE, str(situation.budget), situation.mixture(replay), schedule)
        # a document more or less than asked for, and those held out, must not make an error of the last pass
        made["max_epochs"] = 2 * self.epochs
        kept = f"{self.epochs:g} passes over the documents that the parent finds likeliest"
        return Planned([made], [*reasons, f"stability_gap: {kept}, with {replay:.3g} of old data"])

    def kept_tokens(self, situation: Situation) -> float | None:
        if math.isnan(situation.tokens):
            return None
        return situation.tokens * (1 - self._replay(situation)) / self.epochs / len(situation.fresh)

    def _replay(self, situation: Situation) -> float:
        return max(situation.replay, self.replay.value) if situation.replay else 0.0
