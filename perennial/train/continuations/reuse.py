"""Reuse, don't retrain: one cosine from the last rate to a hundredth, data switched on the way.

Formula: rate from the parent's last rate r down a cosine to r / 100 over the whole update. When it has fallen to r / 5
    (after 71% of the update) the blend of data changes: replay has its share first_replay before and the update's own
    share after.
Source: Parmar et al. 2024, "Reuse, Don't Retrain: A Recipe for Continued Pretraining of Language Models", arXiv
    2407.07263, sections 4.1 (data: a general blend first, then one that emphasises what the update is for) and 4.2.
Differs: their two blends are lists of many sources; here they differ in the share of old data. By default both are the
    same, because nothing is known of the data but which is new, and the update is one stage.
Limits: for updates that are small against the parent's training; it learns a strong shift slowly.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.train.continuations.base import (
    UPDATE,
    Continuation,
    Planned,
    Share,
    Situation,
    check_not_zero,
    left_at,
    stage,
)


class Reuse(Continuation):
    """Two stages on one falling curve."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"first_replay": "50%"}, {"switch": 0.5, "final": "10%"}]

    final: Share = Amount(0.01, "share")
    """Rate at the end, as a share of where the parent was left."""
    switch: float = Field(default=0.2, gt=0, lt=1)
    """The second blend begins when the rate has fallen to this share of where the parent was left."""
    first_replay: Share | None = None
    """Share of old data in the first blend; None: as in the second."""

    def plan(self, situation: Situation) -> Planned:
        check_not_zero(situation, "reuse")
        if self.switch <= self.final.value:
            raise UserError(f"{situation.option} reuse: switch {self.switch} must be above final {self.final}")
        rate = situation.lineage.rate
        why = f"reuse: no re-warming; a cosine from {left_at(situation.lineage)}, to {self.final} of it"
        curve = {"name": "cosine", "peak": rate, "final": str(self.final), "warmup": "0%"}
        if not self._has_two_blends(situation):
            return Planned([stage(UPDATE, str(situation.budget), situation.mixture(), curve)], [why])
        assert self.first_replay is not None
        first, way = self.first_replay.value, fallen_to(self.switch, self.final.value)
        budgets = situation.split(way, 1 - way)
        at = str(Amount(round(way, 4), "share"))
        stages = [
            stage("first-blend", budgets[0], situation.mixture(first), {"name": "part", "of": curve, "last": at}),
            stage("second-blend", budgets[1], situation.mixture(), {"name": "part", "of": curve, "first": at}),
        ]
        blends = (
            f"blends: {first:.4g} of old data, then {situation.replay:.4g}, switched where the rate is "
            f"{self.switch:.3g} of the first ({at} of the way)"
        )
        return Planned(stages, [why, blends])

    def _has_two_blends(self, situation: Situation) -> bool:
        """Whether the first blend differs; without old data there is nothing to differ in."""
        return situation.replay > 0 and self.first_replay not in (None, Amount(situation.replay, "share"))


def fallen_to(share: float, final: float) -> float:
    """How much of the way a cosine from 1 to `final` has gone when it is at `share`."""
    return math.acos(2 * (share - final) / (1 - final) - 1) / math.pi
