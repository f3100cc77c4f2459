"""Spikes, rollbacks, resumes, stops, hangs and failed saves: everything that interrupted a run."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from perennial.report.markup import Column, amount, escape, loss, run_label, table
from perennial.report.rows import Comparison
from perennial.report.runs import number
from perennial.report.sections.base import Section


class Incidents(Section):
    """In the order in which they happened; left out when nothing did."""

    POSITION: ClassVar[int] = 110
    TITLE: ClassVar[str] = "Interruptions"

    def render(self, comparison: Comparison) -> str:
        listed = [(index, row, event) for index, row, run in comparison.runs for event in run.incidents]
        if not listed:
            return ""
        columns = [
            Column("At tokens", [amount(number(event.get("tokens", 0))) for _, _, event in listed]),
            Column("What", [escape(event["event"].replace("_", " ")) for _, _, event in listed], text=True),
            Column("Details", [_details(event) for _, _, event in listed], text=True, wrap=True),
        ]
        words = (
            "A resumed or rolled back run repeats the stretch after its last checkpoint; tables and curves show each "
            "position once, as it stood in the end."
        )
        names = [run_label(row, index, tag=False) for index, row, _ in listed]
        return f"<p>{words}</p>" + table(("Run", names), columns)


def _details(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind == "spike":
        seen, expected = number(event.get("loss")), number(event.get("expected"))
        text = f"training loss {loss(seen)}" if math.isfinite(seen) else escape(event.get("loss"))
        return text + (f", about {loss(expected)} was expected" if math.isfinite(expected) else "")
    if kind == "rollback":
        skipped = event.get("skipped_rows")
        if isinstance(skipped, list) and len(skipped) == 2:
            return f"back to the last checkpoint, rows {escape(skipped[0])} up to {escape(skipped[1])} passed over"
        return "back to the last checkpoint"
    if kind in ("stop", "set_aside", "save_failed"):
        return escape(event.get("reason", ""))
    if kind == "hang":
        return _hanging(event.get("behind"))
    return {"resume": "went on from the checkpoint there", "restart": "began again: no checkpoint was there yet"}[kind]


def _hanging(behind: Any) -> str:
    if not isinstance(behind, list) or not behind:
        return "all processes stood still in the same place"
    told = [
        f"rank {escape(one.get('rank'))} in phase '{escape(one.get('phase'))}' for {number(one.get('seconds')):.0f} s"
        for one in behind
        if isinstance(one, dict)
    ]
    return f"the others waited for {', '.join(told)}"
