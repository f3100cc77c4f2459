"""Every corpus by itself: its loss before and after each run, and how much text that was measured on."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import UNIT_NAMES, Column, Footnotes, change, escape, in_unit, run_label, table
from perennial.report.rows import ALL, NEW, OLD, OTHER, UNCOUNTED, Comparison, Row, value
from perennial.report.sections.base import Section

_WORDS = {OLD: "old", NEW: "new", ALL: "", UNCOUNTED: UNCOUNTED, OTHER: "held out"}


class Corpora(Section):
    """Before, after and change per corpus, in the unit that the runs can be compared in."""

    POSITION: ClassVar[int] = 40
    TITLE: ClassVar[str] = "Corpus by corpus"

    def render(self, comparison: Comparison) -> str:
        continued = any(row.before for row in comparison.rows)
        if not comparison.corpora or (not continued and len(comparison.corpora) < 2):
            return ""
        footnotes = Footnotes("corpora")
        columns = [c for name in comparison.corpora for c in _columns(comparison, name, footnotes, continued)]
        names = [run_label(row, index, tag=False) for index, row in enumerate(comparison.rows)]
        caption = f"Validation loss in {UNIT_NAMES[comparison.unit]}"
        return table(("Run", names), columns, caption=caption) + footnotes.html()


def _columns(comparison: Comparison, name: str, footnotes: Footnotes, continued: bool) -> list[Column]:
    unit, rows = comparison.unit, comparison.rows
    roles = {row.roles[name] for row in rows if name in row.roles}
    role = _WORDS[next(iter(roles))] if len(roles) == 1 else "old or new by run"
    tag = f' <span class="tag">{role}</span>' if role else ""
    group = f"{escape(name)}{tag}{footnotes.mark(_measured_on(comparison, name))}"
    best = _best(comparison, name)
    after = [_cell(row, name, unit, row.label in best) for row in rows]
    if not continued:
        return [Column("Loss", after, group)]
    return [
        Column("Before", [in_unit(row.before.get(name), unit) for row in rows], group),
        Column("After", after, group),
        Column("Change", [_change(row, name, unit) for row in rows], group),
    ]


def _cell(row: Row, name: str, unit: str, best: bool) -> str:
    text = in_unit(row.after.get(name), unit)
    return f'<b class="best">{text}</b>' if best else text


def _change(row: Row, name: str, unit: str) -> str:
    if name not in row.before or name not in row.after:
        return change(None)
    return change(value(row.after[name].minus(row.before[name]), unit), good="low")


def _best(comparison: Comparison, name: str) -> set[str]:
    found = {
        r.label: value(r.after.get(name), comparison.unit) for r in comparison.rows if r.finished and not r.is_base
    }
    known = {label: v for label, v in found.items() if v is not None}
    return {label for label, v in known.items() if v == min(known.values())} if len(known) > 1 else set()


def _measured_on(comparison: Comparison, name: str) -> str:
    sizes = dict.fromkeys((r.after[name].tokens, r.after[name].bytes) for r in comparison.rows if name in r.after)
    told = " or ".join(f"{tokens:,} tokens, {num_bytes:,} bytes of text" for tokens, num_bytes in sizes if tokens)
    return f"<b>{escape(name)}</b>: measured on {told or 'an amount of text that was not recorded'}."
