"""Learning rate and gradient norm of the updates, and where each stage took the rate up and left it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from perennial.report.charts import Frame, Line, line_chart, smooth
from perennial.report.markup import Column, Footnotes, escape, legend, rate, run_label, table
from perennial.report.rows import Comparison
from perennial.report.runs import Stage
from perennial.report.sections.base import Section
from perennial.report.sections.curves import tokens_label, update_marks
from perennial.report.sections.training import HALF_LIFE_SHARE

_BEFORE = "<b>Left at</b>: the rate at which the parent, or the stage before, ended."
_START = "<b>Start</b>: the schedule at its first token; the first update uses the rate at its end."
_END = "<b>End</b>: the rate of the last update that was made."


class Rates(Section):
    """Two charts against tokens, and a table of the stages."""

    POSITION: ClassVar[int] = 70
    TITLE: ClassVar[str] = "Learning rate and gradients"

    def render(self, comparison: Comparison) -> str:
        charts = _rate(comparison) + _gradient(comparison)
        return f'{legend(comparison)}<div class="charts">{charts}</div>{_stages(comparison)}' if charts else ""


def _rate(comparison: Comparison) -> str:
    lines = [
        Line(row.label, run.training["tokens"] + comparison.start(row), run.training["rate"], index)
        for index, row, run in comparison.runs
    ]
    return _figure(comparison, lines, "Learning rate", "of every update")


def _gradient(comparison: Comparison) -> str:
    lines = []
    for index, row, run in comparison.runs:
        good = np.isfinite(run.training["gradient_norm"])
        tokens = run.training["tokens"][good]
        norms = smooth(tokens, run.training["gradient_norm"][good], HALF_LIFE_SHARE * row.tokens)
        lines.append(Line(row.label, tokens + comparison.start(row), norms, index))
    return _figure(comparison, lines, "Gradient norm", "before clipping, moving average")


def _figure(comparison: Comparison, lines: list[Line], title: str, words: str) -> str:
    frame = Frame(
        key=title,
        title=f"{title} against tokens",
        x_label=tokens_label(comparison),
        y_label=title.lower(),
        x_unit="tokens",
        from_zero=True,
        marks=update_marks(comparison),
    )
    svg = line_chart(lines, frame)
    caption = f"{title} <small>{words}, against tokens</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>" if svg else ""


def _stages(comparison: Comparison) -> str:
    listed = [(index, row, stage) for index, row, run in comparison.runs for stage in run.stages]
    if not listed:
        return ""
    stages, footnotes = [stage for _, _, stage in listed], Footnotes("rates")
    columns = [
        Column("Stage", [escape(s.name) for s in stages], text=True),
        Column("Schedule", [escape(s.schedule.get("name", "")) for s in stages], text=True),
        Column(f"Left at{footnotes.mark(_BEFORE)}", [rate(s.rate_before) for s in stages]),
        Column(f"Start{footnotes.mark(_START)}", [rate(s.rate_start) for s in stages]),
        Column("Peak", [rate(s.rate_peak) for s in stages]),
        Column(f"End{footnotes.mark(_END)}", [rate(s.rate_end) for s in stages]),
        Column("Optimizer", [_optimizer(s) for s in stages], text=True),
    ]
    return table(("Run", [run_label(row, i, tag=False) for i, row, _ in listed]), columns) + footnotes.html()


def _optimizer(stage: Stage) -> str:
    name = escape(stage.optimizer.get("name", ""))
    return f"{name}, state {'kept' if stage.optimizer_state == 'keep' else 'reset'}" if stage.optimizer_state else name
