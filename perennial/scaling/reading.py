"""Rows of CSV, JSON or JSONL files, and columns of them by meaning: usual names found, others mapped, units applied.

A mapping reads NAME=COLUMN or NAME=COLUMN:UNIT, such as 'parameters=n_params:M' (millions) or 'loss=val:bits'. Columns
that bear a usual name are found without one. Cells such as '1.4B' count as well.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.core.errors import UserError, nearest

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
        mapped = dict(self._mapped(text, wanted) for text in mappings)
        taken = {name for name, _ in mapped.values()}
        by_case = {name.strip().lower(): name for name in self.names if name not in taken}
        found = {}
        for meaning in wanted:
            usual = (by_case[a] for a in (meaning.lower(), *ALIASES.get(meaning, ())) if a in by_case)
            if (name := next(usual, None)) is not None:
                found[meaning] = (name, "")
        return {**found, **mapped}

    def numbers_of(self, place: Place) -> np.ndarray:
        """A column as float64 in natural units, shape (rows,); empty cells are NaN. Raises UserError."""
        name, unit = place
        scale = UNITS[unit] if unit in UNITS else float(unit)
        each = [self._number(row.get(name), name, n) for row, n in zip(self.rows, self.numbers.tolist(), strict=True)]
        return np.array(each) * scale

    def labels_of(self, place: Place) -> np.ndarray:
        """A column as texts, shape (rows,)."""
        return np.array([str(row.get(place[0], "")) for row in self.rows])

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

    def _number(self, value: Any, name: str, row: int) -> float:
        if value is None or (
            isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null", "na", "n/a")
        ):
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
        match = re.fullmatch(r"\s*([\d.,_]+(?:[eE][+-]?\d+)?)\s*([KkMBGT])\s*\w*\s*", str(value))
        if match is None:
            raise UserError(f"{self.source}: row {row}: '{name}' is {value!r}, which is no number")
        return float(match[1].replace(",", "").replace("_", "")) * UNITS[match[2]]


def shown(places: dict[str, Place]) -> dict[str, str]:
    """{meaning: 'column:unit'} of what was read."""
    return {name: ":".join(part for part in place if part) for name, place in places.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSON (a list of objects, or an object of lists) or JSONL file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            data = json.loads(text)
            if isinstance(data, dict) and data and all(isinstance(v, list) for v in data.values()):
                data = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
            records = data
        else:
            records = list(csv.DictReader(text.splitlines()))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: must hold a list of rows, each with named columns")
    if not records:
        raise UserError(f"{path}: there are no rows in it")
    return records


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
        numbered = [(number, row) for number, row in numbered if str(row.get(name)) == value]
        if not numbered:
            raise UserError(
                f"{path}: --where {condition!r}: no such row; '{name}' is {', '.join(sorted(values)[:8])}."
                f"{nearest(value, values)}"
            )
    return Records(path, [row for _, row in numbered], np.array([number for number, _ in numbered]))
