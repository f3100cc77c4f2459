"""The new text one corpus or part after the other, under one schedule and with replay in each.

Formula: stage i has the share w_i of the update that its corpus has of the tokens of the new text, and is a part of one
    `rewarm` schedule. Of its new text the share m = `mixed` is drawn from all new corpora by their tokens, the rest
    from its own: corpus j has (1 - m) [i = j] + m w_j of it. Over all stages corpus j has w_j of the new text whatever
    m is; m = 0 is domain by domain, m = 1 is one mixture from the first update to the last.
Source: Pavlova and Makhlouf 2023, "BIOptimus: Pre-training an Optimal Biomedical Language Model with Curriculum
    Learning", arXiv 2308.08625 (from easy to hard in stages, each from the weights of the one before); Bengio et al.
    2009, "Curriculum Learning", ICML (easy examples first). Ibrahim et al. 2024, arXiv 2403.08763, went through
    SlimPajama domain by domain, found it poor and advise mixtures.
Differs: BIOptimus makes the masking task of an encoder harder from stage to stage; here the task stays and the text
    changes. Easy is what the parent finds likely, so that by quality and by ease is the same order. Theirs restart the
    schedule in every stage; here all share one.
Limits: a text that is likely because it repeats itself counts as easy. Parts are corpora of their own: documents of
    theirs that the parent has read already are read again.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from perennial.core.amounts import Amount, parse
from perennial.core.errors import UserError
from perennial.train.continuations.base import Arrangement, Continuation, Planned, Share, Situation, stage
from perennial.train.continuations.rewarm import rise_and_fall

EVALUATIONS = 8
"""Evaluations per stage, on average: the loss rises and falls again soon after a switch."""

_WORDS = {
    "given": "in the order in which they were named",
    "easy": "those first that the parent finds likeliest",
    "hard": "those first that the parent finds least likely",
}


class Curriculum(Continuation):
    """One stage per new corpus, or per part of a single one."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"order": "hard", "parts": 5, "mixed": "30%"}, {"mixed": "100%"}]
    USES_PEAK: ClassVar[bool] = True

    order: Literal["given", "easy", "hard"] = "easy"
    """Of several corpora: as named, or by the parent's mean loss; a single one is cut into parts by it."""
    parts: int = Field(default=3, ge=2)
    """Parts of a single corpus, equal in tokens."""
    mixed: Share = Amount(0.0, "share")
    """Share of each stage's new text that is drawn from all of the new text alike."""
    warmup: Share = Amount(0.01, "share")
    """Length of the rise."""

    @field_validator("mixed")
    @classmethod
    def _at_most_all(cls, mixed: Amount) -> Amount:
        if mixed.value > 1:
            raise ValueError(f"{mixed}: must be at most 100%")
        return mixed

    def plan(self, situation: Situation) -> Planned:
        names, shares = self._stages(situation)
        schedule, reasons = rise_and_fall(situation, self.warmup)
        schedule["start"] = situation.lineage.rate  # "parent" would be the stage before, in the later parts
        budgets = situation.split(*shares)
        ends = _ends(budgets)
        stages = [
            stage(
                f"{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}",
                budget,
                self._mixture(situation, name),
                {"name": "part", "of": schedule, "first": first, "last": last},
            )
            for number, (name, budget, first, last) in enumerate(
                zip(names, budgets, ends, ends[1:], strict=False), start=1
            )
        ]
        order = ", ".join(f"{name} ({share:.0%})" for name, share in zip(names, shares, strict=True))
        reasons.append(
            f"curriculum: {len(stages)} stages under one schedule, {_WORDS[self.order]}: {order}; "
            f"{self.mixed} of the new text of each is drawn from all of it"
        )
        every = str(Amount(1 / (EVALUATIONS * len(stages)), "share"))
        return Planned(stages, reasons, {"every": every})

    def arrangement(self) -> Arrangement:
        return Arrangement(self.order, self.parts)

    def _stages(self, situation: Situation) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The corpus of each stage and its share of the update; of a single corpus that is not cut yet, its name."""
        names = situation.fresh
        if len(names) > 1:
            return names, situation.fresh_shares or (1 / len(names),) * len(names)
        if self.order == "given":
            raise UserError(
                f"{situation.option} curriculum: order given goes through several corpora as they are named; name more "
                "with --data, or let order easy or hard cut a single one into parts"
            )
        return names * self.parts, (1 / self.parts,) * self.parts

    def _mixture(self, situation: Situation, own: str) -> dict[str, float]:
        """Shares of the new corpora in the stage of `own`, and of the old data as in any other."""
        mixture = situation.mixture()
        new = sum(mixture[name] for name in situation.fresh)
        alike = situation.fresh_shares or (1 / len(situation.fresh),) * len(situation.fresh)
        drawn = {
            name: new * (self.mixed.value * share + (1 - self.mixed.value) * (name == own))
            for name, share in zip(situation.fresh, alike, strict=True)
        }
        old = {name: share for name, share in mixture.items() if name not in drawn}
        return {**{name: share for name, share in drawn.items() if share > 0}, **old}


def _ends(budgets: list[str]) -> list[str]:
    """0% and where each stage ends, as shares of the update."""
    sums = list(itertools.accumulate(parse(budget).value for budget in budgets))
    return ["0%", *(str(Amount(at / sums[-1], "share")) for at in sums)]
