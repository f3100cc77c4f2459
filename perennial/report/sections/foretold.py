"""What a plan predicted of each run, what was measured, and whether it lay in the interval."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.foretold import FLOPS, Foretold, Outcome, outcome
from perennial.report.markup import NONE, Column, Footnotes, escape, flops, percent, run_label, table
from perennial.report.rows import Comparison
from perennial.report.sections.base import Section

_INTERVAL = "Intervals are meant to hold 80% of outcomes: of five runs that were planned alike, one may lie outside."

_SAME_SHARE = 0.005


class Foretelling(Section):
    """A table for each run with predictions, and the trade-off curve that it was chosen from."""

    POSITION: ClassVar[int] = 95
    TITLE: ClassVar[str] = "Predicted and measured"

    def render(self, comparison: Comparison) -> str:
        blocks = []
        footnotes = Footnotes("foretold")
        for index, row, run in comparison.runs:
            found = outcome(run)
            if found is not None:
                label = run_label(row, index, tag=False)
                blocks.append(_table(found, label, footnotes) + _curve(found, label, row.replay_share))
        if not blocks:
            return ""
        words = "What the plan that made a recipe said before the run, as its recipe carries it, and what came of it."
        return f"<p>{words}</p>{''.join(blocks)}{footnotes.html()}"


def _table(found: Outcome, label: str, footnotes: Footnotes) -> str:
    unknown = found.predictions.unknown if found.predictions else []
    told = [*found.notes, *(f"the plan could not tell it: {line}" for line in unknown)]
    notes = "".join(f"<p>{label}: {escape(note)}.</p>" for note in told)
    if not found.numbers:
        return notes
    mark = footnotes.mark(_INTERVAL)
    numbers = found.numbers
    columns = [
        Column("Value", [_value(n, n.predicted.value) for n in numbers], "Predicted"),
        Column(f"Interval{mark}", [_interval(n) for n in numbers], "Predicted"),
        Column("Value", [_value(n, n.measured) for n in numbers], "Measured"),
        Column("Difference", [_difference(n) for n in numbers], "Measured"),
        Column("In the interval", [_inside(n) for n in numbers], "Measured", text=True, wrap=True),
        Column("Prediction from", [escape(n.predicted.basis) for n in numbers], text=True, wrap=True),
    ]
    return notes + table(("", [escape(n.name) for n in numbers]), columns, caption=label, dense=True)


def _value(one: Foretold, value: float | None) -> str:
    if value is None:
        return NONE
    return flops(value) if one.name == FLOPS else escape(one.text(value))


def _interval(one: Foretold) -> str:
    low, high = one.predicted.low, one.predicted.high
    return "" if low is None or high is None else escape(f"{one.text(low)} to {one.text(high)}")


def _difference(one: Foretold) -> str:
    if one.difference is None:
        return ""
    return f"{'+' if one.difference > 0 else ''}{percent(one.difference)}"


def _inside(one: Foretold) -> str:
    if one.why_not:
        return f'<span class="none">not compared: {escape(one.why_not)}</span>'
    return {True: "yes", False: '<span class="bad">no</span>', None: ""}[one.is_inside]


def _curve(found: Outcome, label: str, share: float | None) -> str:
    """The predicted trade-off between old and new text, with what was measured at the share that the run had."""
    predictions = found.predictions
    if predictions is None or not any(point.old or point.new for point in predictions.curve):
        return ""
    points = predictions.curve
    is_run = [share is not None and abs(point.share - share) < _SAME_SHARE for point in points]
    sides = [s for s in ("old", "new") if any(point.old if s == "old" else point.new for point in points)]
    columns = []
    for side in sides:
        predicted = [_loss(point.old if side == "old" else point.new) for point in points]
        columns.append(Column(f"{side.capitalize()} loss", predicted, "Predicted, nats/token"))
    for side in sides:
        value = next((n for n in found.numbers if n.side == side and n.difference is not None), None)
        if value is not None and value.measured is not None and any(is_run):
            shown = value.text(value.measured)
            cells = [shown if here else "" for here in is_run]
            columns.append(Column(f"{side.capitalize()} loss", cells, "Measured"))
    inner = table(("Share of old text", [f"{point.share:.0%}" for point in points]), columns, dense=True)
    return f"<details><summary>Predicted trade-off of old and new text, {label}</summary>{inner}</details>"


def _loss(estimate: tuple[float, float, float] | None) -> str:
    """'4.512 (4.401 to 4.630)'."""
    if estimate is None:
        return NONE
    value, low, high = estimate
    return f"{value:.3f} <small>({low:.3f} to {high:.3f})</small>"
