"""Validation loss of every corpus against tokens and against FLOPs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from perennial.report.charts import Frame, Line, line_chart
from perennial.report.markup import UNIT_NAMES, escape, legend
from perennial.report.rows import NEW, OLD, Comparison, Row
from perennial.report.sections.base import Section

_EARLY = 0.1
"""Share of a run from random weights that does not decide how high a chart reaches: its start is far above the rest."""
_WIDE = 8.0
"""An axis is logarithmic when the runs' totals differ by this factor or more."""


class Curves(Section):
    """Two charts per corpus: what a run had seen, and what it had spent, when it reached a loss."""

    POSITION: ClassVar[int] = 50
    TITLE: ClassVar[str] = "Validation loss"

    def render(self, comparison: Comparison) -> str:
        charts = "".join(_pair(comparison, name) for name in comparison.corpora)
        if not charts:
            return ""
        words = "Measured on held-out text; lower is better."
        if any(row.continued for _, row, _ in comparison.runs):
            where = (
                "count all tokens of the lineage, so that a continued run begins where its parent stopped"
                if comparison.along_lineage
                else "count the tokens of the run itself"
            )
            words += (
                f" Charts against tokens {where}; charts against FLOPs count those of the run itself, without its "
                "parent's: what an update costs beside retraining."
            )
        if any(not row.continued for _, row, _ in comparison.runs):
            words += " The beginning of training from random weights may lie above the frame."
        return f'<p>{words}</p>{legend(comparison)}<div class="charts">{charts}</div>'


def _pair(comparison: Comparison, name: str) -> str:
    unit, top = UNIT_NAMES[comparison.unit], _top(comparison, name)
    role = {OLD: "old corpus", NEW: "new corpus"}.get(_role(comparison, name), "corpus")
    result = ""
    for axis, axis_name in (("tokens", "tokens"), ("flops", "FLOPs")):
        lines = _lines(comparison, name, axis)
        frame = Frame(
            key=f"curves/{name}/{axis}",
            title=f"{name}: validation loss against {axis_name}",
            x_label=tokens_label(comparison) if axis == "tokens" else "FLOPs of the run",
            y_label=unit,
            x_unit=axis,
            log_x=not (axis == "tokens" and comparison.along_lineage) and wide(lines),
            top=top,
            marks=update_marks(comparison) if axis == "tokens" else (),
        )
        svg = line_chart(lines, frame)
        if svg:
            caption = f"{escape(name)} <small>{role}, {unit} against {axis_name}</small>"
            result += f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
    return result


def _role(comparison: Comparison, name: str) -> str:
    roles = {row.roles[name] for row in comparison.rows if name in row.roles}
    return next(iter(roles)) if len(roles) == 1 else ""


def _lines(comparison: Comparison, name: str, axis: str) -> list[Line]:
    lines = []
    for index, row, run in comparison.runs:
        if axis == "flops" and left_out(comparison, row):
            continue
        measured = [e for e in run.evaluations if name in e.corpora]
        points = [
            (
                comparison.start(row) + e.tokens if axis == "tokens" else e.flops,
                e.corpora[name].in_unit(comparison.unit),
            )
            for e in measured
        ]
        x = np.array([p[0] for p in points], dtype=np.float64)
        y = np.array([np.nan if p[1] is None else p[1] for p in points], dtype=np.float64)
        lines.append(Line(row.label, x, y, index, markers=True))
    return lines


def left_out(comparison: Comparison, row: Row) -> bool:
    """Parents do not appear against FLOPs: that chart compares ways to get the new model."""
    return row.is_base and any(r.continued for r in comparison.rows)


def wide(lines: list[Line]) -> bool:
    """Whether the axis that these lines run along is better logarithmic."""
    ends = [float(line.x.max()) for line in lines if len(line.x) and line.x.max() > 0]
    return bool(ends) and max(ends) >= _WIDE * min(ends)


def tokens_label(comparison: Comparison) -> str:
    """What the tokens axis counts."""
    return "tokens of the lineage" if comparison.along_lineage else "tokens of the run"


def update_marks(comparison: Comparison) -> tuple[tuple[float, str], ...]:
    """Where the updates begin, when they all begin at the same place."""
    starts = {comparison.start(row) for _, row, _ in comparison.runs if row.continued}
    return ((float(starts.pop()), "update begins"),) if len(starts) == 1 and starts != {0} else ()


def _top(comparison: Comparison, name: str) -> float | None:
    """The highest loss that matters: of continued runs at any time, of others after their beginning."""
    values = [
        evaluation.corpora[name].in_unit(comparison.unit)
        for _, row, run in comparison.runs
        for evaluation in run.evaluations
        if name in evaluation.corpora and (row.continued or evaluation.tokens >= _EARLY * row.tokens > 0)
    ]
    known = [v for v in values if v is not None]
    return max(known) if known else None
