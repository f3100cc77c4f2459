"""What retraining on everything would reach for its cost, by the best that is known: one's own laws, else published."""

from __future__ import annotations

from dataclasses import dataclass

from perennial.plan.law_files import LawSays
from perennial.plan.new_models import PUBLISHED_FROM, published_loss
from perennial.plan.numbers import Kind, Number
from perennial.plan.outlooks import Knowledge
from perennial.plan.own_runs import FARTHEST, LEAST_RUNS
from perennial.plan.parts import Outlook
from perennial.plan.transfer import Estimate, RunRow, fit_runs
from perennial.scaling.ledger import LedgerRun

NAME = "loss of retraining"
AGREEMENT = 0.04
"""How far the mean of old and new loss after an update lay from that of retraining at most (Ibrahim et al. 2024)."""
_UNIT = "nats/token"


@dataclass(frozen=True)
class Retrained:
    """The loss of a new model on old and new text together."""

    loss: Estimate | None
    number: Number
    """With its source, or why it cannot be known."""


def retrained(known: Knowledge, expected: Outlook, total: float, says: LawSays) -> Retrained:
    """What a model of the parent's size reaches on `total` tokens of all text; `expected` of the planned update."""
    if says.retraining is not None and known.law is not None:
        words = f"{known.law.source}, at all tokens so far; on text such as the law's"
        return _found(says.retraining, "own runs", words)
    found, why_not = _by_own_runs(known, total)
    if found is not None:
        return found
    if expected.average is not None and expected.old is not None and expected.new is not None:
        low = (1 - AGREEMENT) * (expected.old.low + expected.new.low) / 2
        high = (1 + AGREEMENT) * (expected.old.high + expected.new.high) / 2
        words = (
            f"mean of old and new loss: that of the update, which was within {AGREEMENT:.0%} of it in Ibrahim et al. "
            "2024, arXiv 2403.08763"
        )
        return _found(Estimate(expected.average, low, high), "published", words)
    if known.facts.parameters >= PUBLISHED_FROM[0] and total >= PUBLISHED_FROM[1]:
        unique = sum(text.tokens for text in known.facts.texts)
        words = "Muennighoff et al. 2023, arXiv 2305.16264 (C4, GPT-2's tokenizer): its level is another text's"
        return _found(published_loss(known.facts.parameters, total, unique), "published", words)
    words = (
        f"{why_not}; the old and new loss of the update are not both known; published fits begin at "
        f"{PUBLISHED_FROM[0] / 1e6:g}M parameters and {PUBLISHED_FROM[1] / 1e6:g}M tokens"
    )
    return Retrained(None, Number(NAME, None, _UNIT, "unknown", words))


def _by_own_runs(known: Knowledge, total: float) -> tuple[Retrained | None, str]:
    """By the ledger's runs from random weights on all of the text; else why not."""
    rows = [row for run in known.laws.retrained if (row := _row(known, run)) is not None]
    if len(rows) < LEAST_RUNS:
        have = f"{len(rows)} in your ledger, {LEAST_RUNS} are the fewest" if rows else "none in a --ledger, no --laws"
        return None, f"too few runs of your own from random weights on all of this text ({have})"
    law, row = fit_runs("scratch", rows), RunRow(known.facts.flops_per_token, total)
    if law.times_outside(row) > FARTHEST:
        return None, f"the largest of your own runs on all of this text is {law.times_outside(row):.3g} times smaller"
    words = f"law through your own {law.num_runs} runs on all of this text: mean of old and new loss"
    return _found(law.predict(row), "own runs", words), ""


def _found(loss: Estimate, kind: Kind, source: str) -> Retrained:
    return Retrained(loss, Number(NAME, round(loss.mean, 4), _UNIT, kind, source))


def _row(known: Knowledge, run: LedgerRun) -> RunRow | None:
    """A run from random weights by the mean of old and new loss; None where a corpus was not measured."""
    sides = []
    for is_old in (True, False):
        names = [text.name for text in known.facts.texts if text.is_old == is_old]
        if any(name not in run.losses for name in names):
            return None
        if names:
            sides.append(sum(run.losses[name] for name in names) / len(names))
    return RunRow(run.flops / run.tokens, run.tokens, loss=sum(sides) / len(sides))
