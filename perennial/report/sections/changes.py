"""What each update changed: forgetting, adaptation and backward transfer since the parent."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import UNIT_NAMES, Column, Footnotes, change, escape, percent, run_label, table
from perennial.report.rows import Comparison, Row, value
from perennial.report.sections.base import Section

_FORGETTING = (
    "<b>Forgetting</b> = loss on the old corpora at the end of the run &minus; the same before its first update; "
    "positive means worse than the parent. Mean over the old corpora."
)
_ADAPTATION = (
    "<b>Adaptation</b> = loss on the new corpora before the first update &minus; the same at the end; positive means "
    "better than the parent. Mean over the new corpora."
)
_TRANSFER = (
    "<b>Backward transfer</b> = &minus; forgetting: what learning the new did for the old. Positive means that the "
    "old got better too."
)
_REPLAY = "<b>Replayed</b>: share of the run's tokens that were drawn again from what the parent had seen."


class Changes(Section):
    """The continued runs against their parents, in both units."""

    POSITION: ClassVar[int] = 30
    TITLE: ClassVar[str] = "Change since the parent"

    def render(self, comparison: Comparison) -> str:
        shown = [
            (i, r) for i, r in enumerate(comparison.rows) if r.continued and (r.forgetting is not None or r.adaptation)
        ]
        if not shown:
            return ""
        rows, footnotes = [row for _, row in shown], Footnotes("changes")
        columns = [
            Column("Parent", [escape(row.parent_label) for row in rows], text=True),
            Column(f"Replayed{footnotes.mark(_REPLAY)}", [percent(row.replay_share) for row in rows]),
        ]
        for unit, name in UNIT_NAMES.items():
            columns += _unit_columns(rows, unit, name, footnotes)
        return table(("Run", [run_label(row, i, tag=False) for i, row in shown]), columns) + footnotes.html()


def _unit_columns(rows: list[Row], unit: str, name: str, footnotes: Footnotes) -> list[Column]:
    return [
        Column(
            f"Forgetting{footnotes.mark(_FORGETTING)}",
            [change(value(row.forgetting, unit), good="low") for row in rows],
            name,
        ),
        Column(
            f"Adaptation{footnotes.mark(_ADAPTATION)}",
            [change(value(row.adaptation, unit), good="high") for row in rows],
            name,
        ),
        Column(
            f"Backward<br>transfer{footnotes.mark(_TRANSFER)}",
            [change(value(row.backward_transfer, unit), good="high") for row in rows],
            name,
        ),
    ]
