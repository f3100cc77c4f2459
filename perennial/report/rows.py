"""The rows of a comparison: one run each, in numbers, as data, as JSON and as a table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from perennial.core.amounts import human, human_seconds
from perennial.report.runs import Loss, Run

OLD, NEW, ALL, UNCOUNTED, OTHER = "old", "new", "all", "old, not counted", "other"
ROLES = (OLD, NEW, ALL, UNCOUNTED, OTHER)
COUNTED = (OLD, NEW, ALL)
_VISIBLE = 0.05
"""Smallest share of a chart's width at which the course of a run can still be seen."""


@dataclass(frozen=True)
class Row:
    """One run, or the parent of some, in numbers. Differences are None where one side was not measured."""

    label: str
    run: Run | None
    """The run's files; None for a parent known only through its children's lineage."""
    state: str
    """'finished', or why not and how far it came."""
    finished: bool
    continued: bool
    """True when the run started from a checkpoint."""
    is_base: bool
    """True when another row continues this one."""
    is_reference: bool
    """True when forgetting of others is measured against this run's."""
    is_baseline: bool
    """True when the compute of others is measured against this run's."""
    checkpoint: str | None
    parent: str | None
    parent_label: str | None
    roles: dict[str, str]
    """Corpus -> 'old', 'new', 'all' (nothing is continued), 'old, not counted' (not evaluated on by every run that
    continues what trained on it) or 'other' (evaluated, not counted)."""
    before: dict[str, Loss]
    after: dict[str, Loss]
    old: Loss | None
    new: Loss | None
    average: Loss | None
    tokens: int
    flops: float | None
    seconds: dict[str, float]
    parent_tokens: int
    """Tokens that all ancestors trained on."""
    parent_flops: float | None
    replay_share: float | None
    """Share of the run's tokens that were replayed."""
    forgetting: Loss | None
    adaptation: Loss | None
    backward_transfer: Loss | None
    forgetting_by_corpus: dict[str, Loss]
    adaptation_by_corpus: dict[str, Loss]
    forgetting_removed: float | None = None
    forgetting_reference: str | None = None
    compute_saved: float | None = None
    """1 - update FLOPs / baseline FLOPs."""
    compute_saved_with_parent: float | None = None
    """1 - (update + all ancestors) FLOPs / baseline FLOPs."""
    baseline: str | None = None
    average_above_baseline: Loss | None = None
    """Average loss minus the baseline's on the same corpora; negative is better than the baseline."""

    @property
    def wall_seconds(self) -> float | None:
        """All recorded wall time."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def total_flops(self) -> float | None:
        """FLOPs of the run and all its ancestors."""
        return None if self.flops is None or self.parent_flops is None else self.flops + self.parent_flops

    def names(self, role: str) -> list[str]:
        """The corpora that have this role in the row."""
        return [name for name, its in self.roles.items() if its == role]


@dataclass(frozen=True)
class Comparison:
    """Rows in the order shown, the corpora, the unit that differences are judged in, and what to be careful about."""

    rows: tuple[Row, ...]
    corpora: tuple[str, ...]
    unit: str
    """'nats_per_token', or 'bits_per_byte' when tokenizers differ."""
    same_roles: bool
    """True when every row counts the same corpora as old and new, so that the columns can be compared."""
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[tuple[int, Row, Run]]:
        """The rows that have files, with their position, which is also their line style."""
        return [(index, row, row.run) for index, row in enumerate(self.rows) if row.run is not None]

    @property
    def along_lineage(self) -> bool:
        """Whether curves run over all tokens of a lineage, the ancestors' first.

        Not when nothing is continued, nor when that would squeeze the updates into a corner of the chart.
        """
        continued = [row for _, row, _ in self.runs if row.continued]
        span = max((row.parent_tokens + row.tokens for _, row, _ in self.runs), default=0)
        return max((row.tokens for row in continued), default=0) >= _VISIBLE * span > 0

    def start(self, row: Row) -> int:
        """Where a run's curve begins on the tokens axis."""
        return row.parent_tokens if self.along_lineage else 0

    def row(self, label: str | None) -> Row | None:
        """The row of that label."""
        return next((row for row in self.rows if row.label == label), None)

    def best(self, column: str, unit: str | None = None) -> set[str]:
        """Labels of the finished rows with the lowest 'old', 'new' or 'average'; parents do not compete.

        Empty when there are fewer than two to choose from, they count different corpora, or the unit (the comparison's
        own unless given) cannot be compared.
        """
        unit = unit or self.unit
        if not self.same_roles or (unit == "nats_per_token" and self.unit == "bits_per_byte"):
            return set()
        values = {r.label: value(getattr(r, column), unit) for r in self.rows if r.finished and not r.is_base}
        known = {label: v for label, v in values.items() if v is not None}
        return {label for label, v in known.items() if v == min(known.values())} if len(known) > 1 else set()

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON-ready data, without the curves."""
        return {
            "rows": [_json(row) for row in self.rows],
            "corpora": list(self.corpora),
            "unit": self.unit,
            "same_roles": self.same_roles,
            "notes": list(self.notes),
        }

    def text_table(self) -> str:
        """The table for a terminal, with the notes below it."""
        return _text_table(self)


def value(loss: Loss | None, unit: str) -> float | None:
    """A loss in a unit, or None."""
    return None if loss is None else loss.in_unit(unit)


def _json(data: Any) -> Any:
    """Dataclasses to JSON-ready data; run files and paths are left out, non-finite numbers become null."""
    if isinstance(data, Loss):
        return {k: v for k, v in _json(vars(data)).items() if v != 0 or k in ("nats_per_token", "bits_per_byte")}
    if is_dataclass(data) and not isinstance(data, type):
        content = {f.name: _json(getattr(data, f.name)) for f in fields(data) if f.name != "run"}
        if isinstance(data, Row):
            content["wall_seconds"], content["total_flops"] = _json(data.wall_seconds), _json(data.total_flops)
            content["folder"] = str(data.run.folder) if data.run else None
        return content
    if isinstance(data, dict):
        return {key: _json(item) for key, item in data.items()}
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


# The table for a terminal


def _text_table(comparison: Comparison) -> str:
    rows = comparison.rows
    by_role = any(row.names(OLD) or row.names(NEW) for row in rows)
    columns = [("run", [row.label + ("" if row.finished else " (unfinished)") for row in rows])]
    for unit, short in (("nats_per_token", "nats"), ("bits_per_byte", "bpb")):
        for part in ("old", "new", "average") if by_role else ("average",):
            columns.append((f"{part} {short}", [_text(getattr(row, part), unit) for row in rows]))
    columns += [
        ("tokens", [human(row.tokens) for row in rows]),
        ("FLOPs", ["-" if row.flops is None else f"{row.flops:.2e}" for row in rows]),
        ("wall", ["-" if row.wall_seconds is None else human_seconds(row.wall_seconds) for row in rows]),
    ]
    if any(row.continued for row in rows):
        removed = ["reference" if row.is_reference else _share(row.forgetting_removed) for row in rows]
        saved = ["baseline" if row.is_baseline else _share(row.compute_saved) for row in rows]
        columns += [("forgetting removed", removed), ("compute saved", saved)]
    lines = [_text_line([header for header, _ in columns], columns), _text_rule(columns)]
    lines += [_text_line([cells[index] for _, cells in columns], columns) for index in range(len(rows))]
    return "\n".join([*lines, *(f"- {note}" for note in comparison.notes)])


def _text(loss: Loss | None, unit: str) -> str:
    known = value(loss, unit)
    return "-" if known is None else f"{known:.3f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _width(column: tuple[str, list[str]]) -> int:
    return max(len(cell) for cell in (column[0], *column[1]))


def _text_rule(columns: list[tuple[str, list[str]]]) -> str:
    return "  ".join("-" * _width(column) for column in columns)


def _text_line(cells: list[str], columns: list[tuple[str, list[str]]]) -> str:
    widths = [_width(column) for column in columns]
    padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
    return "  ".join(padded).rstrip()
