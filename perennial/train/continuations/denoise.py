"""UL2R: a short stretch of a mixture of denoisers, at a low rate, behind a causal model's training.

Formula: objective `denoising` (half S, a quarter each R and X); a cosine from where the parent was left to a hundredth
    of it.
Source: Tay et al. 2022, "Transcending Scaling Laws with 0.1% Extra Compute", arXiv 2210.11399, section 3 (UL2R: 1e-4 to
    1e-6 by a cosine, 0.1% of the parent's compute); Tay et al. 2022, "UL2", arXiv 2205.05131.
Limits: plain next-token loss hardly falls by it; it is for filling in and for use after fine-tuning. Needs rows
    without a document mask.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from perennial.core.amounts import Amount
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


class Denoise(Continuation):
    """One stage of another objective."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"share": 0.5}]

    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the rows that are cut; the others are plain text."""
    final: Share = Amount(0.01, "share")
    """Rate at the end, as a share of where the parent was left."""

    def plan(self, situation: Situation) -> Planned:
        check_not_zero(situation, "denoise")
        schedule = {"name": "cosine", "peak": situation.lineage.rate, "final": str(self.final), "warmup": "0%"}
        made = stage(UPDATE, str(situation.budget), situation.mixture(), schedule)
        made["objective"] = {"name": "denoising", "share": self.share}
        reason = (
            f"denoise: UL2R's mixture of denoisers, a cosine from {left_at(situation.lineage)}, to {self.final} of it"
        )
        return Planned([made], [reason])
