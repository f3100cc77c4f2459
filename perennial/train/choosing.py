"""Which way of continuing suits a parent, a shift and a budget, and why, in three sentences."""

from __future__ import annotations

import math
from typing import Any

import yaml

from perennial.core import plugins
from perennial.core.amounts import human
from perennial.core.errors import UserError, nearest
from perennial.train.continuations.base import Continuation, Situation, stands_on_trunk

KIND = "continuations"

TRUNK_SHARE = 0.3
"""A flat rate below this share of the parent's peak is the end of a decay, not a trunk to go on from.

Assumption: published trunks stand between a third (Singh et al. 2025, arXiv 2503.02844) and all of the peak.
"""

REUSE_SHARE = 0.05
"""Updates up to this share of the parent's tokens, after a weak shift, need no re-warming.

Parmar et al. 2024, arXiv 2407.07263: 300B tokens after 8T (4%), where a decay from the last rate did best.
"""

MANY_UPDATES = 5
"""Runs from which on a model counts as one of a stream.

Assumption: with fewer, peaks by the size of the update and by the meta-schedule differ little.
"""

MAX_EPOCHS = 4.0
"""Passes over the new text beyond which it limits the update (Muennighoff et al. 2023, arXiv 2305.16264)."""


def named(given: Any, option: str) -> tuple[str, Continuation]:
    """A continuation by its name, or by a mapping with its name and settings, and the name. Raises UserError."""
    data = {"name": given} if isinstance(given, str) else given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            data = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UserError(f"{option} {given!r}: not a mapping in YAML: {error}") from None
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{option} {given!r}: give a name, or {{name: NAME, SETTING: VALUE}}")
    allowed = plugins.names(KIND)
    if "." not in name and name not in allowed:
        hint = nearest(name, allowed)
        raise UserError(f"{option} {name!r}: choose {', '.join(allowed)}; for another one write a recipe.{hint}")
    continuation, problems = plugins.build(KIND, data)
    if problems:
        found = "; ".join(" ".join([".".join(map(str, p.loc)), p.message]).strip() for p in problems)
        raise UserError(f"{option} {name}: {found}")
    assert isinstance(continuation, Continuation)
    return name, continuation


def choose(situation: Situation) -> tuple[str, str]:
    """The name of the continuation that suits, and three sentences on why: the parent's past, the shift, the budget."""
    name, past, budget = _by_past(situation) or _by_budget(situation)
    return name, f"recipe {name}: {past} {_shift(situation)} {_size(situation)}{budget}."


def _by_past(situation: Situation) -> tuple[str, str, str] | None:
    """What the parent's lineage alone decides."""
    lineage = situation.lineage
    if situation.peak is not None:
        return "rewarm", f"A peak of {situation.peak:.3g} was asked for, so the learning rate rises to it.", ""
    if not lineage.stages:
        words = "The parent was not trained by Perennial, so nothing but its weights can be gone on from."
        return "rewarm", words, "; the peak follows from that"
    if stands_on_trunk(lineage) and lineage.rate >= TRUNK_SHARE * lineage.peak:
        words = f"The parent stands on a trunk at {lineage.rate:.3g}, which needs no re-warming and can go on for ever."
        return "wsd", words, "; its end is decayed, so that there is a model to deploy"
    if lineage.is_branch and situation.has_moments and lineage.trunk_rate >= TRUNK_SHARE * lineage.peak:
        words = (
            f"The parent is a branch that was decayed from {lineage.trunk_rate:.3g} to {lineage.rate:.3g}, and its "
            "optimizer can go straight back to that rate."
        )
        return "wsd_s", words, "; its end is decayed again"
    return None


def _by_budget(situation: Situation) -> tuple[str, str, str]:
    """What is chosen for a parent that was decayed."""
    lineage = situation.lineage
    share, epochs, number = situation.tokens / lineage.tokens, situation.epochs, len(lineage.runs())
    decayed = f"The parent was left at {lineage.rate:.3g}, {lineage.rate / lineage.peak:.0%} of its peak"
    if epochs is not None and epochs > MAX_EPOCHS:
        words = f"{decayed}, and the new text is short for the budget, so repeating it has to be made safe."
        return "data_bound", words, f", more than the {MAX_EPOCHS:g} that come free; a strong weight decay is set"
    if number >= MANY_UPDATES:
        words = f"{decayed}, after {number} runs: peaks that fall from update to update keep what a stream has taught."
        return "meta_schedule", words, "; its peak lies on one cosine with all before it"
    if share <= REUSE_SHARE and not math.isnan(share) and _is_weak(situation):
        return "reuse", f"{decayed}, from where a decay costs no spike.", ", too little to make up for a re-warming"
    return "rewarm", f"{decayed}, so it has to be raised to learn and decayed again to keep.", "; the peak follows"


def _is_weak(situation: Situation) -> bool:
    """Whether the shift was measured and is weak."""
    return situation.shift is not None and situation.shift.kind == "weak"


def _shift(situation: Situation) -> str:
    replay = f"{situation.replay:.0%} of what is read is old data" if situation.replay else "no old data is replayed"
    if situation.shift is None:
        return f"The shift was not measured; {replay}."
    return f"The shift is {situation.shift.kind} (ratio {situation.shift.ratio:.2f}); {replay}."


def _size(situation: Situation) -> str:
    if math.isnan(situation.tokens):
        return f"The update is {situation.budget}"
    whole = math.ceil(situation.tokens / situation.batch_tokens - 1e-9) * situation.batch_tokens
    words = f"The update is {human(whole, 'tokens')}, {whole / situation.lineage.tokens:.3g} of what the parent saw"
    if situation.epochs is None:
        return words
    of = "the shortest new text" if len(situation.fresh) > 1 else "the new text"
    return words + f", {situation.epochs * whole / situation.tokens:.2g} passes over {of}"
