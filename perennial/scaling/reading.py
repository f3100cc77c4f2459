"""Columns of tables by meaning: usual names found, others mapped, units applied, doubts told.

A mapping reads NAME=COLUMN or NAME=COLUMN:UNIT, such as 'parameters=n_params:M' (millions) or 'loss=val:bits'. Columns
that bear a usual name are found without one. Cells such as '1.4B' count as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.core.errors import UserError, nearest
from perennial.scaling.table_file import read_records

FILE = "file"
"""Column that says which of several files a row came from; found under no other name."""
ALIASES: dict[str, tuple[str, ...]] = {  # what a column means, and other names of it, without regard to case
    "parameters": ("n", "params", "n_params", "num_params", "parameter_count", "model_size", "size"),
    "tokens": ("d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "total_tokens"),
    "unique_tokens": ("u", "unique", "num_unique_tokens", "dataset_tokens"),
    "flops": ("c", "compute", "flop", "budget", "training_flop", "train_flops", "c_6nd"),
    "loss": ("val_loss", "validation_loss", "final_loss", "eval_loss", "test_loss"),
    "learning_rate": ("lr", "peak_lr", "peak_learning_rate"),
    "batch": ("bs", "batch_size", "batch_tokens", "global_batch_size"),
    "weight_decay": ("wd",),
    "replay": ("replay_share",),
    "replay_share": ("replay",),
    "schedule": (),
    "domain": ("dataset", "corpus"),
    "curve": ("run", "run_name", "name", FILE),
    "step": ("steps", "update", "updates", "iteration", "iterations", "iter"),
    "rate": ("lr", "learning_rate"),
    "steps": ("steps_to_target", "num_steps"),
    "bits_per_byte": ("bpb",),
    "accuracy": ("acc",),
    "error": ("err",),
}
UNITS = {
    "": 1.0,
    "1": 1.0,
    "K": 1e3,
    "k": 1e3,
    "M": 1e6,
    "B": 1e9,
    "G": 1e9,
    "T": 1e12,
    "%": 0.01,
    "nats": 1.0,
    "bits": math.log(2.0),
}
_SHOWN_COLUMNS = 12
_SHOWN_LIKELY = 3
_LONG_WORD = 4  # letters; shorter ones stand in other words by chance
_ROUNDING = 0.005  # what three digits leave open, at most
_MULTIPLIED = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d._]+(?:[eE][+-]?\d+)?)\s*([KkMBGT])\s*\w*\s*")

Place = tuple[str, str]
"""(column, unit) that holds a meaning."""


@dataclass(frozen=True)
class Records:
    """Rows as they stand in one or several files, and where they came from."""

    source: str
    """The file, or the first of them and how many more."""
    rows: list[dict[str, Any]]
    numbers: np.ndarray
    """Of each row: 1 is the first below the header; the rows of further files count on."""

    @classmethod
    def read(cls, paths: Path | Sequence[Path], where: Sequence[str] = ()) -> Records:
        """The rows that meet every 'column=value' condition. Raises UserError."""
        files = [paths] if isinstance(paths, Path) else list(paths)
        rows = [row if len(files) == 1 else {FILE: path.stem, **row} for path in files for row in read_records(path)]
        source = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        return _chosen(cls(source, rows, np.arange(1, len(rows) + 1)), where)

    @property
    def names(self) -> list[str]:
        """Columns of any row, as they come."""
        return list(dict.fromkeys(str(key) for row in self.rows for key in row if key is not None))

    def places(self, mappings: Sequence[str], meanings: Iterable[str]) -> dict[str, Place]:
        """Where each meaning that is there stands: as mapped, else under a usual name. Raises UserError."""
        wanted = list(meanings)
        mapped: dict[str, Place] = {}
        for text in mappings:
            meaning, place = self._mapped(text, wanted)
            if meaning in mapped:
                raise UserError(f"--column {text!r}: '{meaning}' is mapped already, to '{mapped[meaning][0]}'; say one")
            mapped[meaning] = place
        taken = {name for name, _ in mapped.values()}
        found = {}
        for meaning in wanted:
            if (name := next((name for name in self._usual(meaning) if name not in taken), None)) is not None:
                found[meaning] = (name, "")
        return {**found, **mapped}

    def rivals(self, places: Mapping[str, Place], mappings: Sequence[str], meanings: Iterable[str]) -> list[str]:
        """What to say of columns that bear a usual name of what was found under another, and hold other numbers."""
        mapped, taken = {text.partition("=")[0] for text in mappings}, {name for name, _ in places.values()}
        said = []
        for meaning in (name for name in meanings if name in places and name not in mapped):
            found, values = places[meaning][0], self.numbers_of(places[meaning])
            for name in (name for name in self._usual(meaning) if name not in taken):
                try:
                    others = self.numbers_of((name, ""))
                except UserError:
                    continue  # texts, such as a size of 'small'
                with np.errstate(invalid="ignore"):  # infinities, which are left out later
                    differ = int((np.abs(others - values) > _ROUNDING * np.abs(values)).sum())
                if differ:
                    said.append(
                        f"'{name}' differs from '{found}', which was read as {meaning}, in {differ} of "
                        f"{len(values)} rows; choose with --column {meaning}={found} or --column {meaning}={name}"
                    )
        return said

    def numbers_of(self, place: Place) -> np.ndarray:
        """A column as float64 in natural units, shape (rows,); empty cells are NaN. Raises UserError."""
        name, unit = place
        scale = UNITS[unit] if unit in UNITS else float(unit)
        values = []
        for number, row in zip(self.numbers.tolist(), self.rows, strict=True):
            try:
                value, multiplier = _number(row.get(name))
            except ValueError:
                raise UserError(f"{self.source}: row {number}: '{name}' is {row[name]!r}, which is no number") from None
            if multiplier and scale != 1:
                raise UserError(
                    f"{self.source}: row {number}: '{name}' is {row[name]!r}: cells of '{name}' already carry a unit; "
                    f"say --column without ':{unit}'"
                )
            values.append(value * UNITS[multiplier])
        return np.array(values) * scale

    def labels_of(self, place: Place) -> np.ndarray:
        """A column as texts, shape (rows,)."""
        return np.array([str(row.get(place[0], "")) for row in self.rows])

    def gap(self, number: int, columns: Iterable[str], otherwise: str) -> str:
        """Why a row has no number in one of some columns: that it ends before it, or `otherwise`."""
        row = self.rows[int(np.searchsorted(self.numbers, number))]
        missing = next((name for name in columns if row.get(name) is None), None)
        return otherwise if missing is None else f"the cell of '{missing}' is missing"

    def lacks(self, meaning: str, unit: str) -> UserError:
        """The error for a column that is not there, with the nearest name."""
        names, words = self.names, (meaning, *ALIASES.get(meaning, ()))
        within = [name for name in names for w in words if len(w) >= _LONG_WORD and w in name.lower()]
        likely = [f"'{name}'" for name in dict.fromkeys(within)][:_SHOWN_LIKELY]
        close = f" Did you mean {' or '.join(likely)}?" if likely else ""
        close = close or next((hint for word in words if (hint := nearest(word, names))), "")
        shown = ", ".join(names[:_SHOWN_COLUMNS]) + (", ..." if len(names) > _SHOWN_COLUMNS else "")
        return UserError(
            f"{self.source}: no column of {meaning} ({unit}); map it with --column {meaning}=NAME, or "
            f"{meaning}=NAME:UNIT.{close} Columns: {shown}"
        )

    def _mapped(self, text: str, meanings: Sequence[str]) -> tuple[str, Place]:
        meaning, equals, column = text.partition("=")
        if not equals or not column:
            raise UserError(f"--column {text!r} must look like NAME=COLUMN or NAME=COLUMN:UNIT: parameters=n_params:M")
        if meaning not in meanings:
            raise UserError(
                f"--column {text!r}: '{meaning}' is none of {', '.join(meanings)}.{nearest(meaning, meanings)}"
            )
        name, colon, unit = column.rpartition(":")
        if column in self.names or not colon:
            name, unit = column, ""
        if unit not in UNITS and not re.fullmatch(r"\d+(\.\d*)?([eE][+-]?\d+)?", unit):
            raise UserError(
                f"--column {text!r}: unit '{unit}' is none of {', '.join(u for u in UNITS if u)}, or a number"
            )
        if name not in self.names:
            shown = ", ".join(self.names[:_SHOWN_COLUMNS])
            raise UserError(f"{self.source}: no column '{name}'.{nearest(name, self.names)} Columns: {shown}")
        return meaning, (name, unit)

    def _usual(self, meaning: str) -> list[str]:
        """Columns that bear a usual name of a meaning, the first choice first."""
        words = (meaning.lower(), *ALIASES.get(meaning, ()))
        return [name for word in words for name in self.names if name.strip().lower() == word]


def shown(places: dict[str, Place]) -> dict[str, str]:
    """{meaning: 'column:unit'} of what was read."""
    return {name: ":".join(part for part in place if part) for name, place in places.items()}


def _chosen(records: Records, where: Sequence[str]) -> Records:
    """The rows that meet every condition. Raises UserError."""
    path, numbered = records.source, list(zip(records.numbers.tolist(), records.rows, strict=True))
    for condition in where:
        name, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition!r} must look like COLUMN=VALUE")
        values = {str(row.get(name)) for _, row in numbered if name in row}
        if not values:
            raise UserError(f"{path}: --where {condition!r}: no column '{name}'.{nearest(name, records.names)}")
        numbered = [(number, row) for number, row in numbered if _is_same(row.get(name), value)]
        if not numbered:
            raise UserError(
                f"{path}: --where {condition!r}: no such row; '{name}' is {', '.join(sorted(values)[:8])}."
                f"{nearest(value, values)}"
            )
    return Records(path, [row for _, row in numbered], np.array([number for number, _ in numbered]))


def _is_same(cell: Any, text: str) -> bool:
    """Whether a cell is what a condition asks for: the same text, or the same number."""
    try:
        return str(cell) == text or math.isclose(_value(cell), _value(text), rel_tol=1e-9)
    except ValueError:
        return False


def _value(cell: Any) -> float:
    value, multiplier = _number(cell)
    return value * UNITS[multiplier]


def _number(cell: Any) -> tuple[float, str]:
    """A cell's number and the multiplier after it, '' for none; NaN for an empty cell. ValueError for other texts."""
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in ("", "nan", "none", "null", "na", "n/a")):
        return math.nan, ""
    try:
        return float(cell), ""
    except (TypeError, ValueError):
        pass
    match = _MULTIPLIED.fullmatch(str(cell))
    if match is None:
        raise ValueError(f"no number: {cell!r}")
    return float(match[1].replace(",", "").replace("_", "")), match[2]
