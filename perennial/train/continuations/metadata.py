"""MeCo: documents with their metadata before them, then plain text under the same schedule.

Formula: the schedule of `rewarm` over the whole update; objective `metadata` for the first 90%, `next_token` for the
    rest.
Source: Gao et al. 2025, "Metadata Conditioning Accelerates Language Model Pre-training", arXiv 2501.01956, sections 2
    and 3 (90% and 10%, schedule and optimizer state carried over). Against it: Higuchi et al. 2025, arXiv 2504.17562.
Differs: they pre-train; here it is an update, so that the parent has seen no metadata before.
Limits: needs corpora that were prepared with the metadata fields of the template.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from perennial.core.amounts import Amount
from perennial.train.continuations.base import Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall


class Metadata(Continuation):
    """Two stages under one curve."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"template": "Title: {title}\n\n", "cooldown": 0.2}]
    USES_PEAK: ClassVar[bool] = True

    template: str = "URL: {url}\n\n"
    """What is read before each document; names of metadata fields in braces."""
    cooldown: float = Field(default=0.1, gt=0, lt=1)
    """Share of the update on plain text, at its end."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    def plan(self, situation: Situation) -> Planned:
        schedule, reasons = rise_and_fall(situation, self.warmup)
        schedule["start"] = situation.lineage.rate  # "parent" would be the stage before, in the second part
        at = str(Amount(1 - self.cooldown, "share"))
        budgets = situation.split(1 - self.cooldown, self.cooldown)
        first, second = ({"name": "part", "of": schedule, edge: at} for edge in ("last", "first"))
        conditioned = stage("metadata", budgets[0], situation.mixture(), first)
        conditioned["objective"] = {"name": "metadata", "template": self.template}
        plain = stage("cooldown", budgets[1], situation.mixture(), second)
        plain["objective"] = "next_token"
        return Planned(
            [conditioned, plain],
            [
                *reasons,
                f"metadata: each document is read after {self.template!r}; plain text in the last {self.cooldown:g}",
            ],
        )
