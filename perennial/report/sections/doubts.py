"""What looks wrong with an update: old loss rising at the end, replay too small, rate down too early."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.doubts import doubts
from perennial.report.markup import Column, escape, run_label, table
from perennial.report.rows import Comparison
from perennial.report.sections.base import Section


class Doubts(Section):
    """The signs that `perennial.report.doubts` knows; left out when no run shows one."""

    POSITION: ClassVar[int] = 35
    TITLE: ClassVar[str] = "Where the choice looks wrong"

    def render(self, comparison: Comparison) -> str:
        listed = [(i, row, d) for i, row, _ in comparison.runs for d in doubts(row, comparison.unit)]
        if not listed:
            return ""
        columns = [
            Column("Sign", [escape(doubt.sign) for _, _, doubt in listed], text=True),
            Column("What the records show", [escape(doubt.seen) for _, _, doubt in listed], text=True, wrap=True),
            Column("What to change", [escape(doubt.advice) for _, _, doubt in listed], text=True, wrap=True),
        ]
        return table(("Run", [run_label(row, index, tag=False) for index, row, _ in listed]), columns)
