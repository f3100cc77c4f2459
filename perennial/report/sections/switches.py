"""The losses at each switch of data within a run: before it, at the spike after it, and what is left."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import UNIT_NAMES, Column, amount, change, escape, loss, run_label, table
from perennial.report.rows import Comparison
from perennial.report.sections.base import Section
from perennial.report.switches import switches

_WORDS = (
    "Where a stage draws other data, or in other shares, than the stage before it. <b>Before</b>: at the last "
    "evaluation before the switch. <b>Highest</b>: the highest evaluation in the stage after it; a spike that comes "
    "and goes between two evaluations is not seen (<code>evaluation.every</code> sets how often they come). <b>At the "
    "end</b>: of that stage. <b>Spike</b>: highest &minus; before. <b>Left</b>: at the end &minus; before."
)


class Switches(Section):
    """Runs whose stages differ in their data; left out when there are none."""

    POSITION: ClassVar[int] = 55
    TITLE: ClassVar[str] = "Where the data change"

    def render(self, comparison: Comparison) -> str:
        listed = [(i, row, s) for i, row, run in comparison.runs for s in switches(run, comparison.unit)]
        if not listed:
            return ""
        found, unit = [switch for *_, switch in listed], UNIT_NAMES[comparison.unit]
        columns = [
            Column("Switch to", [escape(s.stage) for s in found], text=True),
            Column("At tokens", [amount(s.tokens) for s in found]),
            Column("Corpus", [escape(s.corpus) for s in found], text=True),
            Column("Before", [loss(s.before) for s in found], unit),
            Column("Highest", [loss(s.highest) for s in found], unit),
            Column("At the end", [loss(s.end) for s in found], unit),
            Column("Spike", [change(s.spike, good="low") for s in found], unit),
            Column("Left", [change(s.left, good="low") for s in found], unit),
            Column("Tokens to<br>the highest", [amount(s.highest_after) for s in found]),
        ]
        names = [run_label(row, index, tag=False) for index, row, _ in listed]
        return f"<p>{_WORDS}</p>" + table(("Run", names), columns, dense=True)
