"""What each run cost, with and without its parent, and what was saved against the named baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from perennial.core.amounts import human, human_bytes
from perennial.report.markup import (
    NONE,
    UNIT_NAMES,
    Column,
    Footnotes,
    bar,
    change,
    escape,
    flops,
    percent,
    run_label,
    seconds,
    table,
)
from perennial.report.rows import Comparison, Row, value
from perennial.report.runs import Run
from perennial.report.sections.base import Section
from perennial.report.style import line_style

_PARENTS = "<b>Parents</b>: training of all ancestors, back to random weights. <b>Total</b>: run and parents."
_UPDATE = "<b>Saved, update</b> = 1 &minus; FLOPs of the run / FLOPs of the baseline. The parent exists already."
_TOTAL = (
    "<b>Saved, total</b> = 1 &minus; FLOPs of the run and all its parents / FLOPs of the baseline. What the first "
    "update of a "
    "model costs from the very beginning; every later update adds only its own."
)
_GAP = "<b>Average</b>: mean loss over the old and new corpora minus the baseline's; negative is better."
_SPEED = (
    "Medians over the run's updates. <b>MFU</b>: FLOPs per second against what the machine reaches in large products."
)
_STRAGGLER = (
    "Part of the training time: what processes waited for the slowest of them at each update, on average, and the "
    "rank that was waited for longest."
)
_SENT = "By each process to the other workers: gradients, or the steps of workers that train apart."
_KINDS = {"train": "Training", "data": "Waiting<br>for data", "evaluate": "Evaluation", "save": "Saving"}


class Cost(Section):
    """A table of compute and one of time."""

    POSITION: ClassVar[int] = 90
    TITLE: ClassVar[str] = "Cost and compute saved"

    def render(self, comparison: Comparison) -> str:
        footnotes = Footnotes("cost")
        compute = _compute(comparison, footnotes)
        time = _time(comparison, footnotes)
        return f"{_words(comparison)}{compute}{time}{footnotes.html()}"


def _words(comparison: Comparison) -> str:
    names = [escape(row.label) for row in comparison.rows if row.is_baseline]
    if not names:
        return ""
    text = (
        f"The baseline is <b>{names[0]}</b>, trained from random weights on the old and the new corpora."
        if len(names) == 1
        else f"Each update is measured against the retrained run on the same corpora: {', '.join(names)}."
    )
    text += " An update costs only itself when the parent exists; the total counts the parent's training as well."
    return f"<p>{text}</p>"


def _compute(comparison: Comparison, footnotes: Footnotes) -> str:
    rows = comparison.rows
    most = max((row.total_flops or row.flops or 0.0 for row in rows), default=0.0)
    columns = [Column("This run", [flops(row.flops) for row in rows], "FLOPs")]
    if any(row.parent_tokens for row in rows):
        mark = footnotes.mark(_PARENTS)
        columns += [
            Column(f"Parents{mark}", [flops(row.parent_flops) if row.continued else "" for row in rows], "FLOPs"),
            Column(f"Total{mark}", [flops(row.total_flops) for row in rows], "FLOPs"),
        ]
    columns.append(Column("", [_flops_bar(row, index, most) for index, row in enumerate(rows)], "FLOPs"))
    if any(row.is_baseline for row in rows):
        columns += _against_retraining(rows, comparison.unit, footnotes)
    names = [run_label(row, index, tag=False) for index, row in enumerate(rows)]
    return table(("Run", names), columns, caption="Compute; the hatched part of a bar is the parents'")


def _against_retraining(rows: Sequence[Row], unit: str, footnotes: Footnotes) -> list[Column]:
    group = "Against retraining"
    update, total, gap = footnotes.mark(_UPDATE), footnotes.mark(_TOTAL), footnotes.mark(_GAP)
    gaps = [change(value(row.average_above_baseline, unit), good="low") for row in rows]
    return [
        Column("Baseline", [_against(row) for row in rows], group, text=True),
        Column(f"Saved,<br>update{update}", [_of(row, percent(row.compute_saved)) for row in rows], group),
        Column(f"Saved,<br>total{total}", [_of(row, percent(row.compute_saved_with_parent)) for row in rows], group),
        Column(f"Average,<br>{UNIT_NAMES[unit]}{gap}", [_of(r, g) for r, g in zip(rows, gaps, strict=True)], group),
    ]


def _of(row: Row, cell: str) -> str:
    return cell if row.baseline is not None else ""


def _against(row: Row) -> str:
    named = escape(row.baseline or "")
    return '<span class="none">baseline</span>' if row.is_baseline else f'<span class="folded">{named}</span>'


def _flops_bar(row: Row, index: int, most: float) -> str:
    if not most or row.flops is None:
        return ""
    colour = f"var({line_style(index).colour})" if row.run is not None else "var(--muted)"
    label = f"{row.label}: {row.flops:.3g} FLOPs, its parents {row.parent_flops or 0:.3g}"
    return bar([(row.flops / most, colour, ""), ((row.parent_flops or 0) / most, "var(--muted)", "hatch")], label)


def _time(comparison: Comparison, footnotes: Footnotes) -> str:
    shown = [(index, row, run) for index, row, run in comparison.runs if row.seconds]
    if not shown:
        return ""
    rows, runs, mark = [row for _, row, _ in shown], [run for _, _, run in shown], footnotes.mark(_SPEED)
    recorded = {kind for row in rows for kind in row.seconds}
    kinds = [*(k for k in _KINDS if k in recorded), *sorted(recorded - set(_KINDS))]
    columns = [Column("Wall", [seconds(row.wall_seconds) for row in rows], "Time")]
    columns += [
        Column(_KINDS.get(kind, escape(kind)), [seconds(row.seconds.get(kind)) for row in rows], "Time")
        for kind in kinds
    ]
    if any(_straggling(run) is not None for run in runs):
        waited = footnotes.mark(_STRAGGLER)
        columns.append(Column(f"Waiting for<br>the slowest{waited}", [_slowest(run) for run in runs], "Time"))
    columns += [
        Column("Tokens/s", [_median(run, "tokens_per_second", human) for run in runs], f"Speed{mark}"),
        Column("MFU", [_median(run, "mfu", lambda share: f"{share:.0%}") for run in runs], f"Speed{mark}"),
        Column("Memory", [_highest(run) for run in runs], f"Speed{mark}"),
    ]
    if any(_sent(run) for run in runs):
        cells = [human_bytes(_sent(run)).replace(" ", "&nbsp;") for run in runs]
        columns.append(Column(f"Sent{footnotes.mark(_SENT)}", cells, f"Speed{mark}"))
    return table(("Run", [run_label(row, i, tag=False) for i, row, _ in shown]), columns, caption="Time and speed")


def _straggling(run: Run) -> float | None:
    """Seconds that the run's processes waited for the slowest of them; None for a run of one process."""
    known = run.training["straggler_seconds"][np.isfinite(run.training["straggler_seconds"])]
    return float(known.sum()) if len(known) else None


def _sent(run: Run) -> float:
    """Bytes that each of the run's processes sent to the end; 0 where that is not recorded."""
    return float(np.nan_to_num(run.training["sent_bytes"]).max(initial=0.0))


def _slowest(run: Run) -> str:
    waited = _straggling(run)
    if waited is None:
        return NONE
    known = np.isfinite(run.training["straggler"]) & np.isfinite(run.training["straggler_seconds"])
    ranks = run.training["straggler"][known].astype(int)
    most = int(np.bincount(ranks, run.training["straggler_seconds"][known]).argmax())
    return f"{seconds(waited)}&nbsp;(rank&nbsp;{most})"


def _median(run: Run, column: str, write: Callable[[float], str]) -> str:
    known = run.training[column][np.isfinite(run.training[column])]
    return write(float(np.median(known))) if len(known) else NONE


def _highest(run: Run) -> str:
    known = run.training["memory_bytes"][np.isfinite(run.training["memory_bytes"])]
    return human_bytes(float(known.max())).replace(" ", "&nbsp;") if len(known) else NONE
