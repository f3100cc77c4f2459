"""A plan for people: what to do, what it costs, what will come of it, and where every number is from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from perennial.core.amounts import human, human_bytes
from perennial.plan.numbers import Number
from perennial.plan.parts import Alternative, Plan, describe_cost
from perennial.plan.retraining import NAME as RETRAINING
from perennial.plan.transfer import Estimate

_WIDTH = 118


def to_text(plan: Plan) -> str:
    """The whole plan, in sections."""
    facts, is_update = plan.facts, plan.facts.parent_tokens > 0
    share = f", {plan.draft.share:.3g} of it old text" if is_update else ""
    texts = ", ".join(
        f"{t.name} ({'old' if t.is_old else 'new'}, {human(t.tokens)}{' by estimate' if t.is_estimate else ''})"
        for t in facts.texts
    )
    parts = [
        f"{facts.model}: {human(facts.parameters)} parameters; text: {texts} tokens",
        "",
        f"Recipe: {plan.draft.continuation}, {human(plan.draft.tokens, 'tokens')}{share}",
        f"  {plan.draft.command}",
        "",
        "Numbers and where they come from",
        *_table(plan.numbers),
        "",
        *(_curve(plan) if is_update else []),
        f"Cost: {describe_cost(plan.cost)}{_memory(plan)}",
        *(
            _wrapped_plain(f"Retraining on everything for about the same result: {_retraining(plan)}")
            if is_update
            else []
        ),
        "",
        "Alternatives",
        *(line for alternative in plan.alternatives for line in _alternative(alternative, is_update)),
    ]
    for title, lines in (("Cannot know", plan.unknown), ("Notes", plan.warnings)):
        if lines:
            parts += ["", title, *(line for text in lines for line in _wrapped(text, "  "))]
    return "\n".join(parts)


def header(plan: Plan) -> str:
    """The plan's predictions and sources as YAML comments; the recipe's own reasons follow it."""
    lines = [f"Planned by `perennial plan` for {plan.budget.text}: {describe_cost(plan.cost)}."]
    lines += [f"{n.name}: {n.text} ({n.kind}: {n.source})" for n in plan.numbers]
    lines += [*plan.unknown, *plan.warnings]
    wrapped = [line for text in lines for line in textwrap.wrap(text, 116, subsequent_indent="  ")]
    return "".join(f"# {line}".rstrip() + "\n" for line in wrapped) + "#\n"


def _table(numbers: Sequence[Number]) -> list[str]:
    shown = [(n.name, _value(n), f"{n.kind}: {n.source}") for n in numbers]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    lines = []
    for name, value, source in shown:
        start = f"  {name:<{widths[0]}}  {value:>{min(widths[1], 28)}}  "
        room = max(40, _WIDTH - len(start))
        first, *rest = textwrap.wrap(source, room) or [""]
        lines += [start + first, *(" " * len(start) + line for line in rest)]
    return lines


def _value(number: Number) -> str:
    if isinstance(number.value, float | int) and number.unit == "bytes":
        return human_bytes(number.value)
    if isinstance(number.value, float | int) and abs(number.value) >= 1e4 and number.unit in ("", "tokens"):
        return f"{number.value:.3g}" if abs(number.value) >= 1e13 else human(number.value)
    return number.text


def _curve(plan: Plan) -> list[str]:
    """The trade-off between old and new text."""
    is_own = any(o.average is not None for o in plan.curve)
    title = "Share of old text, and the losses at the end (nats per token, 80% interval)"
    lines = [title, f"  {'old text':>8}  {'old loss':>24}  {'new loss':>24}  {'mean':>7}"]
    for outlook in plan.curve:
        mark = " <- lowest mean" if is_own and outlook.share == plan.best_share else ""
        mark += " <- this plan" if abs(outlook.share - plan.draft.share) < 1e-9 else ""
        average = f"{outlook.average:.3f}" if outlook.average is not None else "-"
        old, new = _loss(outlook.old, outlook.old_change, "parent"), _loss(outlook.new, outlook.new_change, "0%")
        lines.append(f"  {outlook.share:>8.0%}  {old:>24}  {new:>24}  {average:>7}{mark}")
    return [*lines, ""]


def _loss(loss: Estimate | None, change: Estimate | None, over: str) -> str:
    if loss is not None:
        return f"{loss.mean:.3f} [{loss.low:.3f}, {loss.high:.3f}]"
    if change is not None:
        return f"{over} {change.mean:+.1%} [{change.low:+.0%}, {change.high:+.0%}]"
    return "cannot know"


def _memory(plan: Plan) -> str:
    if plan.draft.memory_bytes is None:
        return ""
    fits = {True: "fits", False: "does not fit", None: "limit not known"}[plan.draft.memory_fits]
    return f", {human_bytes(plan.draft.memory_bytes)} per device ({fits})"


def _retraining(plan: Plan) -> str:
    times = plan.retraining.flops / plan.cost.flops
    words = f"{describe_cost(plan.retraining)}: {times:.3g} times the cost"
    (number,) = (number for number in plan.numbers if number.name == RETRAINING)
    loss = plan.retraining_loss
    reached = "loss: cannot know" if loss is None else f"loss {loss.mean:.3f} [{loss.low:.3f}, {loss.high:.3f}]"
    return f"{words}; {reached} ({number.kind}: {number.source})"


def _alternative(alternative: Alternative, is_update: bool) -> list[str]:
    outlook = alternative.outlook
    losses = f"new {_loss(outlook.new, outlook.new_change, '0%')}"
    if is_update:
        losses = f"old {_loss(outlook.old, outlook.old_change, 'parent')}, {losses}"
    text = f"{alternative.name} ({alternative.why}): {losses}; {describe_cost(alternative.cost)}"
    return [*_wrapped(text, "  "), f"    {alternative.command}"]


def _wrapped_plain(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent + "- ", subsequent_indent=indent + "  ")
