"""One figure beside its bar: what the benchmarks of the laws print, and where they find published tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).resolve().parents[2] / "shared" / "law_data"
"""Published tables, beside the repository; they are not part of it."""


@dataclass(frozen=True)
class Row:
    """A figure and its bar. `passed` is None where there is none, or where the data are absent."""

    id: str
    """Such as 'R1'."""
    what: str
    figure: float | str
    bar: str
    unit: str = ""
    passed: bool | None = None
    note: str = ""


def data(name: str) -> Path | None:
    """A file or folder among the published tables ('chinchilla_epoch/svg_extracted_data.csv'); None when absent."""
    path = TABLES / name
    return path if path.exists() else None


def skipped(row_id: str, what: str, name: str) -> Row:
    """The row of a case whose data are not there."""
    return Row(row_id, what, "skipped", "", note=f"absent: ../shared/law_data/{name}")


def at_most(row_id: str, what: str, figure: float, bar: float, unit: str = "", note: str = "") -> Row:
    """A row that passes when the figure is at most the bar."""
    return Row(row_id, what, float(figure), f"<= {bar:g}", unit, bool(figure <= bar), note)


def within(row_id: str, what: str, figure: float, target: float, margin: float, unit: str = "", note: str = "") -> Row:
    """A row that passes when the figure is within a margin of the target."""
    close = bool(abs(figure - target) <= margin)
    return Row(row_id, what, float(figure), f"{target:g} +- {margin:g}", unit, close, note)


def show(rows: Iterable[Row]) -> list[Row]:
    """Prints each row as it comes and returns them all."""
    result = []
    for row in rows:
        figure = row.figure if isinstance(row.figure, str) else f"{row.figure:.6g}"
        verdict = {True: "met", False: "MISSED", None: ""}[row.passed]
        note = f"  ({row.note})" if row.note else ""
        print(f"{row.id:<5} {row.what:<58} {figure:>12} {row.unit:<8} {row.bar:<20} {verdict:<6}{note}", flush=True)
        result.append(row)
    return result
