"""The result in plain words: what the best update gained, forgot and saved, and against what."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import UNIT_NAMES, amount, change, escape, listed, loss, percent
from perennial.report.rows import ALL, NEW, OLD, Comparison, Row, value
from perennial.report.sections.base import Section

_EVEN = 0.0005
"""Losses closer than this print alike and are called equal."""


class Summary(Section):
    """A few sentences made from the numbers, four figures, and what to be careful about."""

    POSITION: ClassVar[int] = 10
    TITLE: ClassVar[str] = ""

    def render(self, comparison: Comparison) -> str:
        row = featured(comparison)
        if row is None:
            words, figures = _without_update(comparison), ""
        else:
            words, figures = _update(comparison, row), _tiles(comparison, row)
        return f'<p class="lead">{" ".join(words)}</p>{figures}{_careful(comparison)}'


def featured(comparison: Comparison) -> Row | None:
    """The finished continuation with the lowest average loss; the cheaper of two that are equal."""
    rows = [r for r in comparison.rows if r.run is not None and r.continued and r.finished and r.after]

    def rank(row: Row) -> tuple[bool, float, float]:
        average = value(row.average, comparison.unit)
        return average is None, average or 0.0, row.flops or 0.0

    return min(rows, key=rank, default=None)


def _name(label: str | None) -> str:
    return f"<b>{escape(label)}</b>"


def _corpora(row: Row, role: str) -> str:
    names = row.names(role)
    known = len(names) == 1 and names[0] == role
    return f"the {role} text" if known else f"the {role} text ({escape(listed(names))})"


def _update(comparison: Comparison, row: Row) -> list[str]:
    unit, unit_name = comparison.unit, UNIT_NAMES[comparison.unit]
    learned, forgotten = value(row.adaptation, unit), value(row.forgetting, unit)
    text = f"{_name(row.label)} continued {_name(row.parent_label)} for {amount(row.tokens)} tokens"
    if learned is not None:
        end = value(row.new, unit) or 0.0
        way = "took" if learned > 0 else "left"
        text += f" and {way} the loss on {_corpora(row, NEW)} from {loss(end + learned)} to {loss(end)} {unit_name}"
    if forgotten is not None:
        text += f"; {_old_words(row, forgotten)}"
    words = [f"{text}."]
    words += _against_reference(comparison, row)
    words += _price_on_new(comparison, row)
    words += _against_baseline(comparison, row)
    return words


def _old_words(row: Row, forgotten: float) -> str:
    what = f"the loss on {_corpora(row, OLD)}"
    if abs(forgotten) < _EVEN:
        return f"{what} stayed the same"
    return f"{what} {'rose' if forgotten > 0 else 'fell'} by {loss(abs(forgotten))}"


def _against_reference(comparison: Comparison, row: Row) -> list[str]:
    reference = comparison.row(row.forgetting_reference)
    if reference is None or row.forgetting_removed is None:
        return []
    rose = loss(value(reference.forgetting, comparison.unit))
    if row.forgetting_removed < 0:
        return [f"That is more than without replay: {_name(reference.label)} forgot {rose}."]
    said = "all of that and more" if row.forgetting_removed > 1 else f"{percent(row.forgetting_removed)} of that"
    how = "Replay" if row.replay_share else "It"
    return [f"Trained on new text alone, {_name(reference.label)} forgot {rose}; {how.lower()} avoided {said}."]


def _price_on_new(comparison: Comparison, row: Row) -> list[str]:
    """What the update gives away on the new text against the run that is best there."""
    own = value(row.new, comparison.unit)
    others = {
        r.label: value(r.new, comparison.unit)
        for r in comparison.rows
        if r.finished and r.continued and r.parent == row.parent and set(r.names(NEW)) == set(row.names(NEW))
    }
    known = {label: v for label, v in others.items() if v is not None}
    if own is None or not known:
        return []
    best = min(known, key=lambda label: known[label])
    if own - known[best] < _EVEN:
        return []
    return [f"The price is {loss(own - known[best])} on the new text against {_name(best)}."]


def _against_baseline(comparison: Comparison, row: Row) -> list[str]:
    if row.baseline is None or row.compute_saved is None:
        return []
    saved = row.compute_saved
    cost = f"{percent(abs(saved))} {'less' if saved >= 0 else 'more'} compute"
    gap = value(row.average_above_baseline, comparison.unit)
    words = f"The update cost {cost} than training {_name(row.baseline)} from scratch on everything"
    if gap is not None:
        level = f"{loss(abs(gap))} {'lower' if gap < 0 else 'higher'} than"
        link = "and" if (gap <= _EVEN) == (saved >= 0) else "but"
        words += f", {link} its average loss is {'equal to' if abs(gap) < _EVEN else level} that run's"
    total = row.compute_saved_with_parent
    if total is not None:
        even = "the same" if abs(total) < 0.0005 else f"{percent(abs(total))} {'less' if total > 0 else 'more'}"
        words += f"; with the parent's own training counted, the whole lineage cost {even}"
    return [words + "."]


def _without_update(comparison: Comparison) -> list[str]:
    """For runs from random weights, and continuations of which none has finished."""
    unit, unit_name = comparison.unit, UNIT_NAMES[comparison.unit]
    words = []
    for _, row, _ in comparison.runs:
        average = value(row.average, unit)
        done = f"trained on {amount(row.tokens)} tokens" if row.finished else f"is {escape(row.state)}"
        ends = ", ".join(f"{escape(n)} {loss(value(row.after[n], unit))}" for n in row.after)
        tail = f"; validation loss in {unit_name}: {ends}" if ends else ""
        if average is not None and sum(role in (ALL, OLD, NEW) for role in row.roles.values()) > 1:
            tail += f" (average {loss(average)})"
        words.append(f"{_name(row.label)} {done}{tail}.")
    best = comparison.best("average")
    if best:
        words.append(f"The lowest average is that of {listed([_name(label) for label in sorted(best)])}.")
    return words


def _tiles(comparison: Comparison, row: Row) -> str:
    unit, unit_name = comparison.unit, UNIT_NAMES[comparison.unit]
    tiles = []
    reference, forgotten = comparison.row(row.forgetting_reference), value(row.forgetting, unit)
    if reference is not None and row.forgetting_removed is not None:
        moved = "rose" if (forgotten or 0.0) >= 0 else "fell"
        against = f"the old loss {moved} by {loss(abs(forgotten or 0.0))}, that of {_name(reference.label)} rose by "
        against += f"{loss(value(reference.forgetting, unit))} {unit_name}"
        tiles.append(("Forgetting removed", percent(row.forgetting_removed), "", against))
    elif forgotten is not None:
        tiles.append(("Forgetting", change(forgotten), unit_name, f"of {_name(row.label)} on {_corpora(row, OLD)}"))
    learned = value(row.adaptation, unit)
    if learned is not None:
        end = value(row.new, unit) or 0.0
        tiles.append(("New loss", change(-learned), unit_name, f"from {loss(end + learned)} to {loss(end)}"))
    if row.compute_saved is not None:
        total = f"; {percent(row.compute_saved_with_parent)} with the parent's training counted"
        tiles.append(("Compute saved", percent(row.compute_saved), "", f"against {_name(row.baseline)}{total}"))
    gap, base = value(row.average_above_baseline, unit), comparison.row(row.baseline)
    if gap is not None and base is not None:
        level = "equal" if abs(gap) < _EVEN else ("lower is better" if gap < 0 else "worse")
        against = f"{loss(value(row.average, unit))} against {loss(value(base.average, unit))} of {_name(base.label)}"
        tiles.append(("Average against retraining", change(gap, good="low"), unit_name, f"{against}: {level}"))
    items = "".join(_tile(*tile) for tile in tiles)
    return f'<dl class="tiles" aria-label="Key figures of {escape(row.label)}">{items}</dl>'


def _tile(title: str, figure: str, small: str, against: str) -> str:
    below = f" <small>{small}</small>" if small else ""
    words = f'<dd class="against">{against}</dd>'
    return f'<div class="tile"><dt>{title}</dt><dd class="figure">{figure}{below}</dd>{words}</div>'


def _careful(comparison: Comparison) -> str:
    if not comparison.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    return f'<div class="careful" role="note"><p>Read with care</p><ul>{items}</ul></div>'
