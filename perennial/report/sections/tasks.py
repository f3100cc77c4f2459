"""Scores on tasks: every run's, its parent's, and whether the difference can be told from chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from perennial.core.amounts import human
from perennial.report.markup import NONE, Column, Footnotes, escape, listed, run_label, table
from perennial.report.rows import Comparison, Row
from perennial.report.runs import Run
from perennial.report.sections.base import Section

_ARROWS = {True: "&uarr;", False: "&darr;", None: ""}
_DIRECTION = "&uarr; higher is better, &darr; lower is better."
_ERROR = "&plusmn; standard error over the examples: how far chance in their choice may have moved the score."
_CHANGE = (
    "<b>Change</b> = score &minus; the parent's on the same examples, with the 95% interval. Coloured where the "
    "interval leaves out 0; elsewhere these examples cannot tell the two apart."
)
_UNPAIRED = (
    "Run and parent were measured one by one, so the interval comes from their two standard errors; comparing example "
    "by example (<code>perennial eval --against</code>) makes it narrower."
)
_OTHER_EXAMPLES = "The parent was measured on other examples or with other prompts, so no difference is stated."
_QUANTILE = 1.96  # of the normal distribution, for 95%


@dataclass(frozen=True)
class _Measured:
    """A run's newest results, and its parent's."""

    index: int
    row: Row
    run: Run
    tokens: int
    results: Mapping[str, Any]
    parent: Mapping[str, Any]
    """What its parent's own run measured of the checkpoint that this run started from."""
    parent_is_shown: bool
    """True when the parent's column has those very scores."""


@dataclass(frozen=True)
class _Change:
    """A score of the parent, and the difference to it; None where it is not known."""

    before: float | None
    before_error: float | None
    difference: float | None
    low: float | None
    high: float | None
    note: str = ""


class Tasks(Section):
    """One line per task and metric, the runs side by side; left out when nothing was measured."""

    POSITION: ClassVar[int] = 45
    TITLE: ClassVar[str] = "Tasks"

    def render(self, comparison: Comparison) -> str:
        measured = [_measured(comparison, index, row, run) for index, row, run in comparison.runs if run.tasks]
        if not measured:
            return ""
        lines = list(
            dict.fromkeys((t, m) for one in measured for t, facts in one.results.items() for m in facts["metrics"])
        )
        footnotes = Footnotes("tasks")
        metrics = [_metric(measured, task, metric) for task, metric in lines]
        columns = [
            Column(f"Metric{footnotes.mark(_DIRECTION)}", metrics, text=True),
            Column("Examples", [_examples(measured, task) for task, _ in lines]),
            *(column for one in measured for column in _columns(one, lines, footnotes)),
        ]
        made_with = (_facts(measured, key) for key in ("harness", "precision"))
        caption = ", ".join(escape(listed(facts)) for facts in made_with if facts)
        names = [escape(task) for task, _ in lines]
        return table(("Task", names), columns, caption=caption, dense=True) + footnotes.html()


def _measured(comparison: Comparison, index: int, row: Row, run: Run) -> _Measured:
    tokens, of_parent, is_shown = max(run.tasks), {}, False
    for _, _, other in comparison.runs:
        if run.parent is not None and run.parent in other.checkpoints:
            there = other.checkpoints[run.parent]
            of_parent, is_shown = other.tasks.get(there, {}), there == max(other.tasks, default=None)
    return _Measured(index, row, run, tokens, run.tasks[tokens], of_parent, is_shown)


def _facts(measured: Iterable[_Measured], key: str) -> list[str]:
    found = (facts.get(key) for one in measured for facts in one.results.values())
    return [str(value) for value in dict.fromkeys(found) if value]


def _metric(measured: Iterable[_Measured], task: str, metric: str) -> str:
    found = (one.results.get(task, {}).get("metrics", {}).get(metric) for one in measured)
    direction = next((values.get("higher_is_better") for values in found if values), None)
    return f"{escape(metric.replace(',', ', '))} {_ARROWS[direction]}".strip()


def _examples(measured: Iterable[_Measured], task: str) -> str:
    """How many examples were asked, and how many there are when a limit left some out."""
    sizes = dict.fromkeys((f["examples"], f["of"]) for one in measured if (f := one.results.get(task)))
    return " or ".join(f"{asked:,}" + (f" of {there:,}" if there > asked else "") for asked, there in sizes)


def _columns(one: _Measured, lines: Sequence[tuple[str, str]], footnotes: Footnotes) -> list[Column]:
    group = run_label(one.row, one.index, tag=False)
    if one.tokens < one.run.tokens:
        group += footnotes.mark(f"Measured after {human(one.tokens)} tokens, before the end of the run.")
    scores = [one.results.get(task, {}).get("metrics", {}).get(metric, {}) for task, metric in lines]
    score = Column(f"Score{footnotes.mark(_ERROR)}", [_score(s.get("value"), s.get("stderr")) for s in scores], group)
    changes = [_change(one, task, metric) for task, metric in lines]
    if not any(changes):
        return [score]
    header = f"Change{footnotes.mark(_CHANGE)}"
    before = [NONE if change is None else _score(change.before, change.before_error) for change in changes]
    cells = [_change_cell(c, s.get("higher_is_better"), footnotes) for c, s in zip(changes, scores, strict=True)]
    parent = Column("Parent", before, group)
    return [*([] if one.parent_is_shown else [parent]), score, Column(header, cells, group)]


def _change(one: _Measured, task: str, metric: str) -> _Change | None:
    """The run against its parent; None where the parent's score is not known."""
    facts = one.results.get(task, {})
    after = facts.get("metrics", {}).get(metric)
    if after is None:
        return None
    against = facts.get("against") or {}
    if one.run.parent is not None and against.get("checkpoint") == one.run.parent and metric in against["metrics"]:
        paired = against["metrics"][metric]
        return _Change(*(paired.get(key) for key in ("value", "stderr", "difference", "low", "high")))
    there = one.parent.get(task, {})
    before = there.get("metrics", {}).get(metric)
    if before is None:
        return None
    value, error = before.get("value"), before.get("stderr")
    if there.get("examples_id") != facts.get("examples_id"):
        return _Change(value, error, None, None, None, _OTHER_EXAMPLES)
    if value is None or after.get("value") is None:
        return _Change(value, error, None, None, None)
    difference = after["value"] - value
    if error is None or after.get("stderr") is None:
        return _Change(value, error, difference, None, None)
    half = _QUANTILE * math.hypot(error, after["stderr"])
    return _Change(value, error, difference, difference - half, difference + half, _UNPAIRED)


def _change_cell(change: _Change | None, higher_is_better: bool | None, footnotes: Footnotes) -> str:
    if change is None:
        return NONE
    note = footnotes.mark(change.note) if change.note else ""
    if change.difference is None:
        return NONE + note
    text = _signed(change.difference)
    if change.low is None or change.high is None:
        return text + note
    if higher_is_better is not None and not change.low <= 0 <= change.high:
        word = "good" if (change.difference > 0) == higher_is_better else "bad"
        text = f'<span class="{word}">{text}</span>'
    return f"{text} ({_signed(change.low)} to {_signed(change.high)}){note}"


def _score(value: float | None, error: float | None) -> str:
    if value is None:
        return NONE
    return _figure(value) + (f" &plusmn;&thinsp;{_figure(error)}" if error is not None else "")


def _figure(number: float) -> str:
    return f"{number:.3f}" if abs(number) < 100 else f"{number:,.0f}"


def _signed(number: float) -> str:
    shown = _figure(abs(number))
    if not shown.strip("0.,"):
        return shown
    return ("+" if number > 0 else "&minus;") + shown
