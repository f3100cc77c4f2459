"""Draw the weights back to the parent's while they learn: for when the old data are gone.

Formula: the schedule of `rewarm`; after each update at rate r the distance to the parent shrinks by the factor 1 / (1
    + r s) (see `pulls.base`), with s = pull / (updates x mean rate of the schedule): over the whole update the pull
    would take the distance back `pull` times, whatever the rate and the length.
Source: Li, Grandvalet and Davoine 2018, arXiv 1802.01483 (L2-SP); Kirkpatrick et al. 2017, "Overcoming catastrophic
    forgetting in neural networks", arXiv 1612.00796 (Fisher importance, kind `fisher`).
Differs: the strength follows from rate and length, so that one number fits updates of all sizes.
Limits: every weight that has to move is held as well; Li et al. 2025 (TiC-LM, arXiv 2504.02107) find no gain on web
    text.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.train import origin
from perennial.train.continuations.base import UPDATE, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall

_UPDATES_UNKNOWN = 1000
"""For a budget in time of which the tokens are not known."""


class Pull(Continuation):
    """One stage that is held near its parent."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"pull": 0.3}]
    USES_PEAK: ClassVar[bool] = True

    kind: Literal["l2", "fisher"] = "l2"
    """'l2' holds all weights alike; 'fisher' those more that old data are sensitive to, which it has to read."""
    pull: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often the distance to the parent would be taken back over the whole update."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        tokens = situation.tokens
        updates = _UPDATES_UNKNOWN if math.isnan(tokens) else max(1.0, tokens / situation.batch_tokens)
        mean = (schedule["peak"] + schedule["final"]) / 2
        strength = origin.rounded(self.pull / (updates * mean))
        made = stage(UPDATE, str(situation.budget), situation.mixture(), schedule)
        made["pull"] = {"name": self.kind, "strength": strength}
        reason = (
            f"pull: {self.kind} to the parent's weights, strength {strength:g}: {self.pull:g} / (updates x mean rate)"
        )
        return Planned([made], [*reasons, reason])
