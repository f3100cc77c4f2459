"""A budget in, a recipe with predictions out: which text, how much of it, how, at what cost, and what will come of it.

`make_plan` sees numbers only: facts of the model, its past and the text, a budget, laws, and a function that drafts a
recipe for a choice. It chooses tokens and the share of old text and says what to expect; all that `continue` decides
stays decided there. Every number carries its source.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.plan import published
from perennial.plan.budgets import Budget
from perennial.plan.calibration import Calibration, best_peak
from perennial.plan.law_files import LawFile, asked
from perennial.plan.outlooks import Knowledge, best_share, most_replay, outlook
from perennial.plan.own_runs import own_laws
from perennial.plan.parts import Alternative, Choice, Cost, Draft, Drafter, Facts, NewModel, Outlook, Plan
from perennial.plan.retraining import retrained
from perennial.plan.sources import numbers_of, unknown_of, warnings_of
from perennial.scaling.ledger import LedgerRun

EVALUATION_COST = 1 / 3
"""Forward over forward and backward."""


def make_plan(
    facts: Facts,
    budget: Budget,
    draft: Drafter,
    *,
    share: float | None = None,
    how: str | None = None,
    calibration: Calibration | None = None,
    ledger: Sequence[LedgerRun] = (),
    law: LawFile | None = None,
    kind: str = "unknown",
    with_energy: bool = False,
    new_model: NewModel | None = None,
) -> Plan:
    """The plan for a budget. Raises UserError.

    `share`, `how`: as asked for; ledger: finished runs; law: a law file, for a continuation; kind: of the shift, as far
    as it is known; new_model: for one that is no continuation.
    """
    new, old = ([text.name for text in facts.texts if text.is_old == is_old] for is_old in (False, True))
    laws = own_laws(calibration, ledger, new=new, old=old, parent_tokens=facts.parent_tokens)
    old_before = facts.old_before
    if old_before is None and calibration is not None:
        old_before = calibration.old_before
    known = Knowledge(
        facts=facts,
        laws=laws,
        old_before=old_before,
        kind=kind,
        peak=best_peak(calibration) if calibration else None,
        new_model=new_model,
        noise_batch=calibration.noise_batch_tokens if calibration else None,
        law=law,
    )
    affordable = budget.flops(facts.flops_per_token) / facts.flops_per_token
    _check_enough(facts, budget, affordable)
    has_old = new_model is None and any(text.is_old for text in facts.texts)
    warnings: list[str] = []
    if new_model is None and not has_old:
        warnings.append(
            "no old text was found where the lineage has it, nor named: nothing is replayed, and much will be "
            "forgotten; say where it is with --replay NAME=PATH"
        )
    chosen = share if share is not None else best_share(known, affordable, has_old)
    tokens = _limited(facts, affordable, chosen or 0.0, warnings)
    tokens_bound, share_bound = "", ""
    if tokens < affordable:
        tokens_bound = f"{published.MOST_EPOCHS:g} passes over the new text; {budget.text!r} pays for more"
    most = most_replay(facts, tokens)
    if share is None and has_old and most < (published.SHARES[2] if chosen is None else chosen):
        chosen = most
        warnings.append(
            f"{most:.2%} old text is the most: beyond it what the model has seen would be read more than "
            f"{published.FREE_EPOCHS:g} times; name more old text with --replay NAME=PATH"
        )
        share_bound = f"what the model has seen, read {published.FREE_EPOCHS:g} times: more was not worth it"
    factor = known.peak.factor if known.peak else 1.0
    choice = Choice(tokens, chosen, factor, how, tokens_bound, share_bound)
    made = draft(choice)
    within = _within_time(facts, budget, made)
    if within < made.tokens:
        choice = replace(choice, tokens=within)
        made = draft(choice)
    shares = [s for s in published.SHARES if has_old or s == 0]
    expected = outlook(known, made.share, made.tokens)
    curve = tuple(outlook(known, s, made.tokens) for s in shares)
    averages = {o.share: o.average for o in curve if o.average is not None}
    cost = _cost(facts, budget, made.tokens, made.flops, made.evaluated_tokens, with_energy)
    says = asked(law, facts, old_before, made.share, made.tokens)
    again = retrained(known, expected, facts.parent_tokens + made.tokens, says) if new_model is None else None
    own_numbers = [*says.numbers, *([again.number] if again else [])]
    return Plan(
        facts=facts,
        budget=budget,
        draft=made,
        outlook=expected,
        curve=curve,
        best_share=min(averages, key=lambda s: averages[s]) if averages else None,
        cost=cost,
        retraining=_retraining(facts, budget, made, with_energy),
        retraining_loss=again.loss if again else None,
        alternatives=_alternatives(known, budget, made, choice, has_old, with_energy),
        numbers=(*numbers_of(known, budget, made, expected, cost, choice, share), *own_numbers),
        warnings=(*warnings, *says.notes, *warnings_of(known, budget, made, calibration)),
        unknown=(*unknown_of(known, made.tokens, has_old), *says.unknown),
    )


def _check_enough(facts: Facts, budget: Budget, tokens: float) -> None:
    """Raises UserError for a budget below one update and for a corpus smaller than one batch."""
    if tokens < facts.batch_tokens:
        raise UserError(
            f"--budget {budget.text!r}: {human(tokens, 'tokens')} are less than one update of {facts.batch_tokens} "
            "tokens; raise it, or lower the batch with --set batch.sequences=N"
        )
    for text in facts.texts:
        if text.tokens < facts.batch_tokens:
            raise UserError(
                f"corpus '{text.name}': {human(text.tokens, 'tokens')} ({text.basis}) are less than one batch of "
                f"{facts.batch_tokens} tokens; give more text, or lower the batch with --set batch.sequences=N"
            )


def _within_time(facts: Facts, budget: Budget, made: Draft) -> float:
    """The tokens that a budget of time leaves when evaluations are paid for as well; at least one update."""
    if budget.amount.unit != "seconds":
        return float(made.tokens)
    spent = budget.flops(facts.flops_per_token) / facts.flops_per_token - made.evaluated_tokens * EVALUATION_COST
    return max(float(facts.batch_tokens), min(float(made.tokens), spent - spent % facts.batch_tokens))


def _limited(facts: Facts, tokens: float, share: float, warnings: list[str]) -> float:
    """The tokens that are worth spending: no more passes over the new text than help."""
    epochs = tokens * (1 - share) / facts.fresh_tokens
    if epochs <= published.MOST_EPOCHS:
        return tokens
    kept = published.MOST_EPOCHS * facts.fresh_tokens / (1 - share)
    kept -= kept % facts.batch_tokens
    warnings.append(
        f"the budget pays for {epochs:.1f} passes over the new text, of which those after {published.MOST_EPOCHS:g} "
        f"are worth nothing: {human(kept, 'tokens')} are planned instead of {human(tokens, 'tokens')}; more "
        f"new text, or a larger model, would use the rest ({published.REPEAT_SOURCE})"
    )
    return kept


def _cost(facts: Facts, budget: Budget, tokens: float, flops: float, evaluated: float, with_energy: bool) -> Cost:
    spent = flops + evaluated * EVALUATION_COST * facts.flops_per_token
    hours = spent / budget.flops_per_second / 3600
    device_hours = hours * budget.count
    return Cost(
        tokens=tokens,
        flops=flops,
        hours=hours,
        device=f"{budget.count} x {budget.device.name}",
        energy_kwh=device_hours * budget.device.watts / 1000 if with_energy else None,
        money=device_hours * budget.price_per_hour if budget.price_per_hour is not None else None,
    )


def _retraining(facts: Facts, budget: Budget, made: Draft, with_energy: bool) -> Cost:
    """Everything that the model has seen and the update, from random weights."""
    tokens = facts.parent_tokens + made.tokens
    return _cost(facts, budget, tokens, facts.parent_flops + made.flops, 0.0, with_energy)


def _alternatives(
    known: Knowledge, budget: Budget, made: Draft, choice: Choice, has_old: bool, with_energy: bool
) -> tuple[Alternative, ...]:
    """Two or three other choices: half the tokens, and more or less old text; another schedule where there is none."""
    facts, found = known.facts, []

    def add(name: str, why: str, share: float, tokens: float, command: str) -> None:
        flops = made.flops * tokens / made.tokens
        cost = _cost(facts, budget, tokens, flops, made.evaluated_tokens, with_energy)
        found.append(Alternative(name, why, command, outlook(known, share, tokens), cost))

    half = max(facts.batch_tokens, made.tokens / 2 // facts.batch_tokens * facts.batch_tokens)
    amount = f"{half:.15g} tokens"
    if known.new_model is None:
        again, why = (
            replace_option(made.command, "--tokens", amount),
            "half the cost; less of both learned and forgotten",
        )
    else:
        again, why = f"the same with --budget '{amount}'", "half the cost"
    add("half the tokens", why, made.share, half, again)
    if has_old:
        steps = list(published.SHARES)
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - made.share))
        for step, name, why in (
            (nearest + 1, "more old text", "forgets less, learns less"),
            (nearest - 1, "less old text", "learns more, forgets more"),
        ):
            if 0 <= step < len(steps):
                share = steps[step]
                add(name, why, share, made.tokens, replace_option(made.command, "--replay", f"{share:.4g}"))
    elif known.new_model is not None:
        for name, why, loss, tokens, flops, command in known.new_model.others:
            cost = _cost(facts, budget, tokens, flops, 0.0, with_energy)
            found.append(Alternative(name, why, command, Outlook(0.0, tokens, loss, None), cost))
    elif facts.parent_tokens:
        other = "constant" if made.continuation == "rewarm" else "rewarm"
        words = "learns and forgets less" if other == "constant" else "learns and forgets more"
        command = replace_option(made.command, "--recipe", other)
        add(f"recipe {other}", words, made.share, made.tokens, command)
    return tuple(found)


def replace_option(command: str, option: str, value: str) -> str:
    """A command line with an option (one whose value holds no '=') set to another value."""
    words = shlex.split(command)
    if option == "--replay":
        value = f"{100 * float(value):g}%"
    places = [i for i, w in enumerate(words) if w == option and "=" not in words[i + 1]]
    if places:
        words[places[-1] + 1] = value
    else:
        words += [option, value]
    return shlex.join(words)
