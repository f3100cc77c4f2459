"""A continued run beside others that went on from the same checkpoint: forgotten and learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from perennial.report.frontier import Point, better_in_both, dot, frontier_chart
from perennial.report.markup import NONE, UNIT_NAMES, Column, Footnotes, amount, change, escape, flops, listed, percent
from perennial.report.markup import table as html_table
from perennial.report.neighbours import MOST_FOLDERS, Found, last_events, losses_by, neighbours_of
from perennial.report.rows import NEW, OLD, Comparison, Row, value
from perennial.report.runs import EVENTS, Loss, Run
from perennial.report.sections.base import Section

MOST_POINTS = 24
"""Runs that were not given and are shown, those with the lowest sum of both losses; more could not be told apart."""

_MOST_NAMES = 3
"""Names that are listed of the folders that are left out for one reason."""
_BETTER = "<b>Better in both</b>: a run here that forgot no more and learned no less; none: it lies on the frontier."
_FLOPS = (
    "Of a model that an ensemble has taught the <b>FLOPs</b> are those of all members too; of the members together "
    "those of all of them."
)


@dataclass(frozen=True)
class _Alternative:
    """A row of the table and its point."""

    point: Point
    is_given: bool
    tokens: int | None
    flops: float
    replay_share: float | None
    how: str
    counts_members: bool = False


class Alternatives(Section):
    """A chart and a table for each parent with two children or more, those in neighbouring folders included."""

    POSITION: ClassVar[int] = 32
    TITLE: ClassVar[str] = "Forgetting against adaptation"

    def render(self, comparison: Comparison) -> str:
        parents = dict.fromkeys(row.parent for _, row, _ in comparison.runs if row.continued and row.parent)
        groups = [[(i, row, run) for i, row, run in comparison.runs if row.parent == parent] for parent in parents]
        return "".join(_group(comparison, group) for group in groups)


def _group(comparison: Comparison, given: Sequence[tuple[int, Row, Run]]) -> str:
    """One parent's children; '' when there is nothing beside the one that was given."""
    prints = _fingerprints(comparison)
    model = next((row for _, row, _ in given if row.names(OLD) and row.names(NEW) and row.before), None)
    if model is None:
        return ""
    alike = [
        (i, row, run) for i, row, run in given if all(set(row.names(r)) == set(model.names(r)) for r in (OLD, NEW))
    ]
    shown = [a for i, row, run in alike for a in _of_row(comparison, prints, i, row, run)]
    if not any(a.is_given for a in shown):
        return ""
    found = _beside(given)
    kept = {row.label for _, row, _ in alike}
    found.left_out.update({row.label: "other old or new text" for _, row, _ in given if row.label not in kept})
    others = list(_of_neighbours(comparison.unit, prints, model, found))
    others.sort(key=lambda a: a.point.forgetting - a.point.adaptation)
    hidden = len(others) - MOST_POINTS
    rows = _styled([*shown, *others[:MOST_POINTS]], first=len(comparison.rows))
    if len(rows) < 2:
        return ""
    key = f"alternatives/{model.parent}"
    return _words(given, model, found, len(others), hidden) + _chart(comparison, rows, key) + _table(comparison, rows)


def _fingerprints(comparison: Comparison) -> dict[str, str]:
    """Fingerprint of each corpus by the name that all runs share."""
    names: dict[str, str] = {}
    for _, _, run in comparison.runs:
        for name, facts in run.corpora.items():
            if facts.get("fingerprint"):
                names.setdefault(facts["fingerprint"], name)
    return {name: fingerprint for fingerprint, name in names.items()}


def _beside(given: Sequence[tuple[int, Row, Run]]) -> Found:
    """What lies in the folders beside all the runs given, each once, those that are given themselves left out."""
    own = {run.folder.resolve() for _, _, run in given}
    places = {run.folder.resolve().parent: run for _, _, run in given}
    together = Found()
    for run in places.values():
        found = neighbours_of(run.folder, str(run.parent))
        together.runs.extend(n for n in found.runs if n.folder.resolve() not in own)
        together.left_out.update(
            {n: why for n, why in found.left_out.items() if run.folder.resolve().parent / n not in own}
        )
        together = Found(together.runs, together.left_out, together.not_looked_at + found.not_looked_at)
    return together


def _of_neighbours(unit: str, prints: Mapping[str, str], model: Row, found: Found) -> Iterator[_Alternative]:
    """The runs that were found; one that cannot be compared with `model` is noted among those that are left out."""
    for run in found.runs:
        old, new, why = _changes(unit, prints, model, run.before, run.after)
        if why:
            found.left_out[run.folder.name] = why
            continue
        yield _Alternative(
            Point(run.folder.name, old, new, 0),
            is_given=False,
            tokens=run.tokens,
            flops=run.ensemble.get("flops", run.flops),
            replay_share=run.replay_share,
            how=", ".join(run.schedules),
            counts_members=bool(run.ensemble),
        )


def _of_row(
    comparison: Comparison, prints: Mapping[str, str], index: int, row: Row, run: Run
) -> Iterator[_Alternative]:
    """A finished run that was given, and the ensemble that taught it; nothing where one of the losses is not known."""
    old, new = value(row.forgetting, comparison.unit), value(row.adaptation, comparison.unit)
    if old is None or new is None or row.flops is None or not row.finished:
        return
    ensemble = last_events(run.folder / EVENTS, "ensemble").get("ensemble", {})
    yield _Alternative(
        Point(row.label, old, new, index),
        is_given=True,
        tokens=row.tokens,
        flops=ensemble.get("flops", row.flops),
        replay_share=row.replay_share,
        how=", ".join(dict.fromkeys(str(stage.schedule.get("name", "")) for stage in run.stages)),
        counts_members=bool(ensemble),
    )
    if ensemble:
        yield from _together(comparison, prints, row, run, ensemble)


def _together(
    comparison: Comparison, prints: Mapping[str, str], row: Row, run: Run, ensemble: Mapping[str, Any]
) -> Iterator[_Alternative]:
    """The members of an ensemble, measured as one."""
    own = {name: facts.get("fingerprint", "") for name, facts in run.corpora.items()}
    before = {prints[name]: loss for name, loss in row.before.items() if name in prints}
    after = losses_by(own, ensemble["corpora"])
    old, new, why = _changes(comparison.unit, prints, row, before, after)
    if not why:
        members = ensemble["members"]
        yield _Alternative(
            Point(f"{row.label}: all {len(members)} members together", old, new, 0),
            is_given=False,
            tokens=sum(member["tokens"] for member in members),
            flops=sum(member["flops"] for member in members),
            replay_share=row.replay_share,
            how="mean of probabilities",
            counts_members=True,
        )


def _changes(
    unit: str, prints: Mapping[str, str], model: Row, before: Mapping[str, Loss], after: Mapping[str, Loss]
) -> tuple[float, float, str]:
    """(rise on the old corpora, fall on the new ones, '') on the corpora of `model`, or why they are not known."""
    means = []
    for role in (OLD, NEW):
        rises = []
        for name in model.names(role):
            at, own = prints.get(name, ""), model.before.get(name)
            if at not in before or at not in after:
                return math.nan, math.nan, f"not measured on {name}"
            if own is not None and own.tokens and own.tokens != before[at].tokens:
                return math.nan, math.nan, f"measured on another part of {name}"
            rise = value(after[at].minus(before[at]), unit)
            if rise is None or not math.isfinite(rise):
                return math.nan, math.nan, f"no finite loss on {name}"
            rises.append(rise)
        means.append(sum(rises) / len(rises))
    return means[0], -means[1], ""


def _styled(rows: Sequence[_Alternative], first: int) -> list[_Alternative]:
    """Those that are no rows of the comparison get the colours and markers after its own."""
    styled = []
    for row in rows:
        if not row.is_given:
            row, first = replace(row, point=replace(row.point, style=first)), first + 1
        styled.append(row)
    return styled


def _words(given: Sequence[tuple[int, Row, Run]], model: Row, found: Found, number: int, hidden: int) -> str:
    text = f"All of these continued {escape(model.parent_label)}; up and to the left is better."
    if number:
        runs = "1 run" if number == 1 else f"{number} runs"
        text += f" {runs} of the same parent {'was' if number == 1 else 'were'} found in the neighbouring folders."
    if hidden > 0:
        text += f" {hidden} of them with the highest losses {'is' if hidden == 1 else 'are'} not shown."
    if found.left_out:
        text += f" Left out: {_left_out(found.left_out)}."
    if found.not_looked_at:
        text += f" Only the first {MOST_FOLDERS} folders were looked at; {found.not_looked_at} more lie there."
    return f"<p>{text}</p>"


def _left_out(reasons: Mapping[str, str]) -> str:
    """'a, b and 3 more (not finished); c (not measured on new)'."""
    by_reason: dict[str, list[str]] = {}
    for name, why in sorted(reasons.items()):
        by_reason.setdefault(why, []).append(escape(name))
    told = []
    for why, names in by_reason.items():
        more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES + 1 else []
        told.append(f"{listed([*(names[:_MOST_NAMES] if more else names), *more])} ({escape(why)})")
    return "; ".join(told)


def _chart(comparison: Comparison, rows: Sequence[_Alternative], key: str) -> str:
    unit = UNIT_NAMES[comparison.unit]
    chart = frontier_chart(
        [row.point for row in rows],
        key=key,
        x_label=f"forgetting: rise of the old loss, {unit} (left is better)",
        y_label=f"adaptation: fall of the new loss, {unit} (up is better)",
    )
    return f'<div class="charts">{chart}</div>'


def _table(comparison: Comparison, rows: Sequence[_Alternative]) -> str:
    footnotes, unit = Footnotes("alternatives"), UNIT_NAMES[comparison.unit]
    points = [row.point for row in rows]
    beaten = [[other.label for other in better_in_both(point, points)] for point in points]
    mark = footnotes.mark(_FLOPS) if any(row.counts_members for row in rows) else ""
    columns = [
        Column("Forgetting", [change(point.forgetting, good="low") for point in points], unit),
        Column("Adaptation", [change(point.adaptation, good="high") for point in points], unit),
        Column("Replayed", [percent(row.replay_share) for row in rows]),
        Column("Schedule", [escape(row.how) or NONE for row in rows], text=True),
        Column("Tokens", [amount(row.tokens) for row in rows], "Cost"),
        Column(f"FLOPs{mark}", [flops(row.flops) for row in rows], "Cost"),
        Column(f"Better in both{footnotes.mark(_BETTER)}", [_named(names) for names in beaten], text=True, wrap=True),
    ]
    names = [_label(row) for row in rows]
    return html_table(("Run", names), columns) + footnotes.html()


def _named(names: Sequence[str]) -> str:
    if not names:
        return '<span class="none">none</span>'
    return escape(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _label(row: _Alternative) -> str:
    tag = ' <span class="tag">this report</span>' if row.is_given else ""
    long = " long" if len(row.point.label) > 14 else ""
    name = f'<span class="name">{escape(row.point.label)}{tag}</span>'
    return f'<span class="run{long}">{dot(row.point.style)}{name}</span>'
