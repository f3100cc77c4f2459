"""What to expect of a choice: losses by the laws of own runs where these reach, else by a law file or as published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perennial.core.errors import UserError
from perennial.plan import published
from perennial.plan.calibration import PeakAdvice
from perennial.plan.law_files import LawFile, forgotten
from perennial.plan.own_runs import FARTHEST, OwnLaws
from perennial.plan.parts import Facts, NewModel, Outlook
from perennial.plan.small_copies import USUAL_SHARE
from perennial.plan.transfer import Estimate, RunLaw, RunRow


@dataclass(frozen=True)
class Knowledge:
    """Laws and what they may be asked."""

    facts: Facts
    laws: OwnLaws
    old_before: float | None
    kind: str
    """Of shift: 'weak', 'strong' or 'unknown'."""
    peak: PeakAdvice | None
    new_model: NewModel | None = None
    noise_batch: float | None = None
    """Gradient noise scale in tokens, where it was measured."""
    law: LawFile | None = None
    """A law file of the user's own."""

    def own(self, law: RunLaw | None, row: RunRow) -> bool:
        """Whether a law of own runs reaches this far."""
        return law is not None and law.times_outside(row) <= FARTHEST


def best_share(known: Knowledge, tokens: float, has_old: bool) -> float | None:
    """The share of the lowest mean of old and new loss by own runs; None leaves it to `continue`."""
    if not has_old:
        return 0.0
    most = most_replay(known.facts, tokens)
    outlooks = [outlook(known, share, tokens) for share in published.SHARES if share <= most]
    averages = {o.share: o.average for o in outlooks if o.average is not None}
    return min(averages, key=lambda s: averages[s]) if len(averages) == len(outlooks) else None


def most_replay(facts: Facts, tokens: float) -> float:
    """The share of old text at which what can be replayed is read as often as comes free, rounded down."""
    share = published.FREE_EPOCHS * facts.replayable_tokens / tokens
    return min(1.0, math.floor(1e3 * share) / 1e3)


def row_of(known: Knowledge, share: float, tokens: float) -> RunRow:
    """A choice as the laws of own runs take it."""
    facts = known.facts
    before = math.nan if known.old_before is None else known.old_before
    return RunRow(facts.flops_per_token, tokens, share, facts.parent_tokens, before)


def outlook(known: Knowledge, share: float, tokens: float) -> Outlook:
    """What to expect of a share of old text and a number of tokens."""
    if known.new_model is not None:
        return Outlook(0.0, tokens, known.new_model.loss_of(tokens), None)
    epochs = tokens * (1 - share) / known.facts.fresh_tokens
    worth = tokens * published.value_of_epochs(epochs) / epochs if epochs > 1 else tokens
    row = row_of(known, share, worth)
    peak = known.peak or PeakAdvice(1.0, "")
    new = (
        known.laws.new.predict(row).times(peak.new_ratio) if known.laws.new and known.own(known.laws.new, row) else None
    )
    new_change = None if new else cost_of_replay(known, share)
    old_row = row_of(known, share, tokens)
    old, old_change = None, None
    if known.laws.old and known.old_before is not None and known.own(known.laws.old, old_row):
        old = _at_peak(known, known.laws.old, known.old_before, known.laws.old.predict(old_row), tokens)
    elif (by_law := forgotten_by_law(known, share, tokens)) is not None:
        old = by_law
    elif known.facts.parent_tokens:
        old_change = published.forgetting(share, known.kind)
        if known.old_before is not None:
            old = _scaled(old_change, known.old_before)
    return Outlook(share, tokens, new, old, new_change, old_change)


def cost_of_replay(known: Knowledge, share: float) -> Estimate:
    """Rise of the new loss over an update without old text: by own runs where there are enough, else as published."""
    own = known.laws.replay_cost
    return own.rise(share) if own is not None else published.cost_of_replay(share, known.kind)


def forgotten_by_law(known: Knowledge, share: float, tokens: float) -> Estimate | None:
    """The old loss by a law file of forgetting; None without one, or where it must not be asked."""
    if known.law is None or not known.law.is_of_forgetting or known.old_before is None:
        return None
    try:
        return forgotten(known.law, known.facts, known.old_before, share, tokens)
    except UserError:
        return None


def _at_peak(known: Knowledge, law: RunLaw, before: float, found: Estimate, tokens: float) -> Estimate:
    """The old loss at the plan's peak: what was seen at the share of the sweep, less where less is forgotten."""
    if known.peak is None:
        return found
    swept = math.log(law.predict(row_of(known, USUAL_SHARE, tokens)).mean / before)
    weight = min(1.0, max(0.0, math.log(found.mean / before) / swept)) if swept > 0 else 1.0
    return found.times(known.peak.old_ratio**weight)


def _scaled(change: Estimate, loss: float) -> Estimate:
    return Estimate(loss * (1 + change.mean), loss * (1 + change.low), loss * (1 + change.high))
