"""Where every number of a plan is from, what cannot be known and why, and what a user must not miss."""

from __future__ import annotations

import numpy as np

from perennial.core.amounts import human
from perennial.plan import published
from perennial.plan.budgets import Budget
from perennial.plan.calibration import Calibration, mismatches
from perennial.plan.numbers import Kind, Number
from perennial.plan.outlooks import Knowledge, forgotten_by_law, row_of
from perennial.plan.own_runs import FARTHEST
from perennial.plan.parts import Choice, Cost, Draft, Facts, Outlook
from perennial.plan.transfer import Estimate, RunLaw
from perennial.scaling.laws.adamw_timescale import AdamWTimescale
from perennial.scaling.laws.base import Law
from perennial.scaling.laws.base import published as published_law
from perennial.scaling.laws.batch_size import BatchSize
from perennial.scaling.optimizer_settings import timescale

GROWTH_FACTOR = 4.0
"""A model is worth growing when the best size for all that will have been spent is this many times its own.

Du et al. 2024, "Stacking Your Transformers", arXiv 2405.15319: growth by 4 served best.
"""
OPTIMAL_TOKENS = 20.0
"""Tokens per parameter (Hoffmann et al. 2022, arXiv 2203.15556); 10 to 28 on the same data by a bootstrap."""


_Row = tuple[str, float | str | None, str, Kind, str]


def numbers_of(
    known: Knowledge, budget: Budget, made: Draft, outlook: Outlook, cost: Cost, choice: Choice, share: float | None
) -> list[Number]:
    """Every number of the plan with its source."""
    rows = [
        *_text_rows(known, budget, made, choice),
        *(
            []
            if known.new_model
            else [("share of old text", made.share, "", *_share_source(known, made, choice, share))]
        ),
        *_manner_rows(known, made),
        *_batch_rows(known, made),
        *_cost_rows(budget, made, cost),
        *_loss_rows(known, outlook),
    ]
    return [Number(*row) for row in rows]


def _text_rows(known: Knowledge, budget: Budget, made: Draft, choice: Choice) -> list[_Row]:
    """Size of the model, and what it reads."""
    facts, new = known.facts, known.new_model
    size: tuple[Kind, str] = (new.kind, new.size_source) if new else ("counted", "configuration")
    rows: list[_Row] = [
        ("parameters", float(facts.parameters), "", *size),
        ("FLOPs per token", facts.flops_per_token, "", "counted", "closed form of model.cost"),
    ]
    for text in facts.texts:
        kind: Kind = "assumed" if text.is_estimate else "counted"
        rows.append((f"unique tokens of {text.name}", text.tokens, "", kind, text.basis))
    given: tuple[Kind, str] = ("given", f"budget {budget.text!r}, in whole updates")
    bound: tuple[Kind, str] = ("published", f"{choice.tokens_bound} ({published.REPEAT_SOURCE})")
    rows.append(("tokens", float(made.tokens), "", *(bound if choice.tokens_bound else given)))
    for name in dict.fromkeys(name for stage in made.stages for name in stage.drawn):
        drawn = sum(stage.drawn.get(name, 0.0) for stage in made.stages)
        passes = sum(stage.epochs.get(name, 0.0) for stage in made.stages)
        rows.append((f"tokens of {name}", drawn, "", "counted", "shares of the mixture"))
        rows.append((f"passes over {name}", passes, "", "counted", published.REPEAT_SOURCE))
    return rows


def _manner_rows(known: Knowledge, made: Draft) -> list[_Row]:
    """Schedule and optimizer."""
    first, last = made.stages[0], made.stages[-1]
    source = f"{'rule for new models' if known.new_model else 'continuation'} {made.continuation}"
    decay = last.weight_decay
    own = _reason(made, "weight decay", f"{last.optimizer}'s own")
    rows: list[_Row] = [
        ("peak learning rate", max(stage.rate_peak for stage in made.stages), "", *_peak_source(known, made)),
        ("final learning rate", last.rate_end, "", "default", source),
        ("warm-up", first.warmup_tokens, "tokens", "default", source),
        ("schedule", "; ".join(stage.schedule for stage in made.stages), "", "default", source),
        ("weight decay", decay, "", "default", f"{own}, on matrices"),
    ]
    if last.optimizer == "adamw" and decay:
        batch, tokens = float(known.facts.batch_tokens), float(last.tokens)
        share = timescale(batch=batch, tokens=tokens, learning_rate=last.rate_peak, weight_decay=decay)
        best = _published(AdamWTimescale(), "power_lines", tokens_per_parameter=tokens / known.facts.parameters)
        words = f"share of the run that AdamW averages over; best by Bergsma et al. 2025, arXiv 2505.13738: {best:.3g}"
        rows.append(("time scale of AdamW", share, "", "counted", words))
    return rows


def _batch_rows(known: Knowledge, made: Draft) -> list[_Row]:
    """The batch, and the two measures of how large it may be."""
    total = known.facts.parent_tokens + made.tokens
    critical = _published(BatchSize(), "zhang_critical", tokens=total)
    words = "beyond it tokens are wasted; Zhang et al. 2024, arXiv 2410.21676, of all tokens so far"
    rows: list[_Row] = [
        ("batch", made.batch, "", "default", _reason(made, "batch")),
        ("critical batch", critical, "tokens", "published", words),
    ]
    if known.noise_batch is not None:
        words = "measured on a small copy (McCandlish et al. 2018, arXiv 1812.06162)"
        rows.append(("gradient noise scale", known.noise_batch, "tokens", "own runs", words))
    return rows


def _published(law: Law, name: str, **inputs: float) -> float:
    """What a published law says at one place."""
    coefficients, _ = published_law(law, name)
    return float(law.predict({key: np.array([value]) for key, value in inputs.items()}, coefficients)[0])


def _cost_rows(budget: Budget, made: Draft, cost: Cost) -> list[_Row]:
    rows: list[_Row] = [
        ("FLOPs", cost.flops, "", "counted", "tokens x FLOPs per token"),
        ("time", cost.hours, "h", *_speed_source(budget)),
        ("memory per device", made.memory_bytes, "bytes", "counted", "perennial plan --memory, closed form"),
    ]
    if cost.energy_kwh is not None:
        rows.append(("energy", cost.energy_kwh, "kWh", "assumed", f"{budget.device.watts:g} W per device, no cooling"))
    if cost.money is not None:
        rows.append(("money", cost.money, "$", "given", f"${budget.price_per_hour:g} per device and hour"))
    return rows


def _loss_rows(known: Knowledge, outlook: Outlook) -> list[_Row]:
    if known.new_model is not None:
        kind: Kind = known.new_model.kind if outlook.new else "unknown"
        return [("loss", _mean(outlook.new), "nats/token", kind, known.new_model.source)]
    rows: list[_Row] = [
        ("new loss", _mean(outlook.new), "nats/token", *_new_source(known, outlook)),
        ("old loss", _mean(outlook.old), "nats/token", *_old_source(known, outlook)),
    ]
    if outlook.new_change is not None and outlook.share:
        own = known.laws.replay_cost
        words = f"runs that differ in the share alone, of your own {own.num_runs} runs" if own else published.SOURCE
        kind = "own runs" if own else "published"
        rows.append(("rise of the new loss by replay", outlook.new_change.mean, "", kind, words))
    return rows


def _mean(estimate: Estimate | None) -> float | None:
    return estimate.mean if estimate else None


def _reason(made: Draft, word: str, otherwise: str = "as before") -> str:
    """The reason of the recipe that begins with a word."""
    return next((reason for reason in made.reasons if reason.startswith(word)), otherwise)


def _share_source(known: Knowledge, made: Draft, choice: Choice, share: float | None) -> tuple[Kind, str]:
    if share is not None:
        return "given", "asked for with --replay"
    if choice.share_bound:
        return "published", f"{choice.share_bound} ({published.REPEAT_SOURCE})"
    if choice.share is not None and known.laws.old is not None:
        return "own runs", f"lowest mean of old and new loss by the laws of {known.laws.old.num_runs} runs"
    return "published", f"{made.share_reason} (Ibrahim et al. 2024, arXiv 2403.08763; strong: arXiv 2503.05029)"


def _peak_source(known: Knowledge, made: Draft) -> tuple[Kind, str]:
    if known.peak is not None and known.peak.factor != 1.0:
        return "own runs", f"{known.peak.factor:.3g} x the rule's; {known.peak.note}"
    return "default", made.peak_reason


def _speed_source(budget: Budget) -> tuple[Kind, str]:
    if budget.device.mfu == 1.0:
        return "own runs", budget.device.source
    return "assumed", f"{budget.device.source}; MFU {budget.device.mfu:g}: {budget.device.mfu_source}"


def _new_source(known: Knowledge, outlook: Outlook) -> tuple[Kind, str]:
    if outlook.new is None or known.laws.new is None:
        return "unknown", known.laws.reason or "own runs are too small to say"
    return "own runs", _law_words(known.laws.new)


def _old_source(known: Knowledge, outlook: Outlook) -> tuple[Kind, str]:
    if outlook.old is None:
        return "unknown", "the parent's own is not recorded"
    if outlook.old_change is not None:
        return "published", f"the parent's loss and {published.SOURCE}, shift {known.kind}: wide"
    law = known.laws.old
    if law is not None and known.own(law, row_of(known, outlook.share, outlook.tokens)):
        return "own runs", _law_words(law)
    assert known.law is not None, "what else tells it"
    return "own runs", known.law.source


def _law_words(law: RunLaw) -> str:
    return f"law through your own {law.num_runs} runs, which it meets within {law.residual:.2%}"


def unknown_of(known: Knowledge, tokens: int, has_old: bool) -> list[str]:
    """What cannot be told, and why."""
    lines: list[str] = []
    if known.new_model is not None:
        if known.new_model.loss_of(tokens) is None:
            lines.append(
                "loss: cannot know: published fits begin at 7M parameters and 100M tokens, on another text; "
                "`perennial plan none --calibrate` measures yours, `perennial laws fit` fits your own runs"
            )
        return lines
    row = row_of(known, 0.05, tokens)
    how = "`perennial plan --calibrate` measures it on your text with small runs"
    for side, law in (("new", known.laws.new), ("old", known.laws.old)):
        if side == "old" and not (has_old or known.facts.parent_tokens):
            continue
        if side == "old" and forgotten_by_law(known, 0.05, tokens) is not None:
            continue
        if law is None:
            why = known.laws.reason if side == "new" else known.laws.old_reason
            lines.append(f"{side} loss: cannot know from your own runs: {why}; {how}")
        elif not known.own(law, row):
            lines.append(
                f"{side} loss: cannot know: the largest of your own runs is {law.times_outside(row):.3g} times "
                f"smaller, at most {FARTHEST:g} can be bridged"
            )
    if known.old_before is None and known.facts.parent_tokens:
        lines.append("old loss: the parent's own is not recorded, so only its rise can be said")
    if known.kind == "unknown" and known.facts.parent_tokens:
        words = "shift between old and new text: not measured; published weak and strong ones bound the curve"
        advice = "; --measure-shift measures it, as `continue` without --replay does"
        lines.append(words + (advice if has_old else ""))
    return lines


def warnings_of(known: Knowledge, budget: Budget, made: Draft, calibration: Calibration | None) -> list[str]:
    """What a user must not miss."""
    facts, lines = known.facts, [*budget.notes()]
    if facts.past_is_estimate:
        lines.append("the model's past is estimated (tokens, learning rates); state it with --parent, it sets the peak")
    for text in facts.texts:
        if text.is_estimate:
            lines.append(f"{text.name}: {human(text.tokens, 'tokens')} are an estimate ({text.basis})")
    lines += _measured_otherwise(facts, made)
    epochs = made.tokens * (1 - made.share) / facts.fresh_tokens
    if epochs > published.FREE_EPOCHS:
        worth = published.value_of_epochs(epochs)
        lines.append(
            f"{epochs:.1f} passes over the new text are worth {worth:.1f} of new text ({published.REPEAT_SOURCE})"
        )
    if made.memory_fits is False:
        lines.append(
            "it does not fit into the device's memory; `perennial plan --memory` on the recipe says what to lower"
        )
    if calibration is not None:
        lines += mismatches(calibration, facts.checkpoint, facts.fingerprints, made.continuation)
    if known.noise_batch is not None and facts.batch_tokens > 2 * known.noise_batch:
        lines.append(
            f"a batch of {facts.batch_tokens} tokens is more than twice the gradient noise scale "
            f"({human(known.noise_batch, 'tokens')}): smaller updates would learn more from the same tokens"
        )
    lines += [reason for reason in made.reasons if reason.startswith("warning: ")]
    if known.new_model is None:
        lines.append(growth(facts, made.tokens))
    return lines


def _measured_otherwise(facts: Facts, made: Draft) -> list[str]:
    """Old losses that the run will measure on another part of the validation text than the parent was measured on."""
    return [
        f"the parent's loss on {name} was measured on {tokens} tokens, this run will measure on "
        f"{made.measured_on[name]}: the report cannot compare the two; plan with --set evaluation.tokens={tokens}"
        for name, tokens in facts.old_measured_on.items()
        if made.measured_on.get(name, tokens) != tokens
    ]


def growth(facts: Facts, tokens: float) -> str:
    """Whether a larger model would use the tokens better, and why; growing is not built."""
    total = facts.parent_tokens + tokens
    best = total / OPTIMAL_TOKENS
    ratio = best / facts.parameters
    words = f"{human(total, 'tokens')} in all are {total / facts.parameters:.3g} per parameter"
    basis = f"{OPTIMAL_TOKENS:g} are optimal (Hoffmann et al. 2022, arXiv 2203.15556)"
    if ratio >= GROWTH_FACTOR:
        return (
            f"grow: yes, {words}, {basis}: a model {GROWTH_FACTOR:g} times as large would reach a lower loss for the "
            "compute; smaller ones stay cheaper to run. This version cannot grow models"
        )
    return f"grow: no, {words}; {basis}, growth pays from {GROWTH_FACTOR:g} times that on"
