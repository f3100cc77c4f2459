"""The table: old, new and average loss, tokens, FLOPs, time, forgetting removed, compute saved."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import (
    UNIT_NAMES,
    Column,
    Footnotes,
    amount,
    escape,
    flops,
    in_unit,
    listed,
    percent,
    run_label,
    seconds,
    table,
)
from perennial.report.rows import ALL, NEW, OLD, Comparison, Row, value
from perennial.report.sections.base import Section

_PARTS = (("old", "Old"), ("new", "New"), ("average", "Average"))


class Results(Section):
    """One row per run; the best of each loss column stands out."""

    POSITION: ClassVar[int] = 20
    TITLE: ClassVar[str] = "Results"

    def render(self, comparison: Comparison) -> str:
        rows, footnotes = comparison.rows, Footnotes("results")
        continued = any(row.continued for row in rows)
        columns = [c for unit in UNIT_NAMES for c in _losses(comparison, unit, footnotes)]
        columns += [
            Column(f"Tokens{footnotes.mark(_COST)}", [amount(row.tokens) for row in rows], "Cost"),
            Column("FLOPs", [flops(row.flops) for row in rows], "Cost"),
            Column("Wall time", [seconds(row.wall_seconds) for row in rows], "Cost"),
        ]
        if continued:
            removed = footnotes.mark(_removed_note(comparison))
            saved = footnotes.mark(_saved_note(comparison))
            columns += [
                Column(f"Forgetting<br>removed{removed}", [_removed(row) for row in rows], "Verdict"),
                Column(f"Compute<br>saved{saved}", [_saved(row) for row in rows], "Verdict"),
            ]
        names = [run_label(row, index) for index, row in enumerate(rows)]
        classes = ["parent" if row.is_base else "" for row in rows]
        return table(("Run", names), columns, row_classes=classes) + footnotes.html()


_COST = (
    "<b>Tokens, FLOPs, time</b> are of the run itself, not of its parent. FLOPs are those of forward and backward "
    "passes in closed form. Wall time is training, waiting for data, evaluation and saving; of a parent without its "
    "run folder, training only."
)


_BITS = (
    "<b>Bits per byte</b> = nats of all tokens / ln 2 / bytes of the same text in UTF-8. It does not depend on the "
    "tokenizer."
)


def _losses(comparison: Comparison, unit: str, footnotes: Footnotes) -> list[Column]:
    parts = [p for p in _PARTS if p[0] == "average" or any(r.names(p[0]) for r in comparison.rows)]
    first = unit == next(iter(UNIT_NAMES))
    group = "Loss, nats per token" if first else "Bits per byte"
    mark = footnotes.mark(_loss_note(comparison) if first else _BITS)
    columns = []
    for part, title in parts:
        best = comparison.best(part, unit)
        cells = [
            f'<b class="best">{in_unit(getattr(row, part), unit)}</b>'
            if row.label in best
            else in_unit(getattr(row, part), unit)
            for row in comparison.rows
        ]
        columns.append(Column(title, cells, group + mark))
    return columns


def _loss_note(comparison: Comparison) -> str:
    text = "<b>Loss</b> is the mean cross-entropy on held-out text at the end of the run."
    names = {role: [n for row in comparison.rows for n in row.names(role)] for role in (OLD, NEW, ALL)}
    told = {role: listed([escape(n) for n in dict.fromkeys(found)]) for role, found in names.items() if found}
    if OLD in told:
        text += f" <b>Old</b>: corpora that the parent was trained on ({told[OLD]})."
    if NEW in told:
        text += f" <b>New</b>: corpora that the run was trained on and the parent was not ({told[NEW]})."
    text += " <b>Average</b>: over these corpora, each counting the same"
    text += f" ({told[ALL]})." if ALL in told else "."
    if any(comparison.best(part) for part, _ in _PARTS):
        text += " The lowest of each column stands out; parents and unfinished runs do not compete."
    return text + " One training run each: differences as small as those between two seeds mean nothing."


def _removed(row: Row) -> str:
    return '<span class="none">reference</span>' if row.is_reference else percent(row.forgetting_removed)


def _removed_note(comparison: Comparison) -> str:
    names = [escape(row.label) for row in comparison.rows if row.is_reference]
    text = (
        "<b>Forgetting removed</b> = 1 &minus; rise of the run's old loss / rise of the reference's, both since the "
        "parent. The reference continues the same parent on the same new corpora without anything old in its "
        "mixture; of several it is the one that forgot most"
    )
    return f"{text} (here {listed(names)})." if names else f"{text} (none here)."


def _saved(row: Row) -> str:
    return '<span class="none">baseline</span>' if row.is_baseline else percent(row.compute_saved)


def _saved_note(comparison: Comparison) -> str:
    names = [escape(row.label) for row in comparison.rows if row.is_baseline]
    text = (
        "<b>Compute saved</b> = 1 &minus; FLOPs of the run / FLOPs of the baseline: the price of an update, for "
        "someone who has the parent already, against training a new model on the old and the new corpora"
    )
    better = any((value(r.average_above_baseline, comparison.unit) or 0) > 0 for r in comparison.rows)
    warn = " It says nothing about quality: see the averages." if better else ""
    return f"{text} (here {listed(names)}).{warn}" if names else f"{text} (none here)."
