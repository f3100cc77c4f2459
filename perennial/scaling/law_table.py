"""The columns that any law reads, from files: found or mapped by the law's own input names, in its units, and checked.

Laws of size and tokens alone have stricter checks of their own, see `table.RunTable`. Curves, whose loss depends on all
rates before, are rows with the name of a run, or one file each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from perennial.core.errors import UserError
from perennial.scaling.curves import CURVE, RATE, STEP, with_rates
from perennial.scaling.laws.base import Input, Law
from perennial.scaling.reading import Place, Records, shown
from perennial.scaling.table import SIZES, Flag, RunTable, check_sizes, is_of_runs

_FRACTIONS = ("share",)
_ABOVE_ZERO = ("updates", "samples", "models", "tokens/parameter", "tokens/byte")
_LABELS = (CURVE.name,)


def read_for(
    law: Law | None,
    paths: Path | Sequence[Path],
    mappings: Sequence[str] = (),
    *,
    where: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> RunTable | LawTable:
    """The table that a law is fitted to; None stands for the blend of laws of size and tokens. Raises UserError."""
    if law is None or is_of_runs(law):
        return RunTable.read(paths, mappings, where=where, drop=drop)
    if drop:
        raise UserError(f"--drop {drop[0]}: rows are flagged so only for laws of loss by size and tokens")
    return LawTable.read(paths, law, mappings, where=where)


@dataclass(frozen=True)
class LawTable:
    """Columns that a law reads, natural units, shape (rows,) each, and the flags that reading them raised."""

    columns: dict[str, np.ndarray]
    rows: np.ndarray
    """Number in the file of each row that is left."""
    flags: tuple[Flag, ...]
    source: str
    mapped: dict[str, str]
    """{meaning: 'column:unit'} of what was read."""
    curves: np.ndarray
    """Name of the run of each row, where rows belong to curves; else empty texts."""

    @classmethod
    def read(
        cls,
        paths: Path | Sequence[Path],
        law: Law,
        mappings: Sequence[str] = (),
        *,
        where: Sequence[str] = (),
        is_measured: bool = True,
    ) -> LawTable:
        """The law's inputs and its target, which need not be there unless `is_measured`.

        Raises UserError that names what is of no use.
        """
        records = Records.read(paths, where)
        needed = [*law.inputs, *([law.TARGET] if is_measured else [])]
        places = records.places(mappings, [i.name for i in (*law.inputs, law.TARGET)])
        for i in needed:
            # The rates of a run are optional to the law, which may be given them whole, but not in a file.
            if i.name not in places and (not i.optional or i.name == RATE.name):
                raise records.lacks(i.name, f"{i.about}, {i.unit}")
        columns = {
            name: records.labels_of(place) if name in _LABELS else records.numbers_of(place)
            for name, place in places.items()
        }
        curves = columns.get(CURVE.name, np.full(len(records.rows), ""))
        rivals = records.rivals(places, mappings, [name for name in places if name not in _LABELS])
        flags = tuple(Flag(None, "other column", text, False) for text in rivals)
        table = cls(columns, records.numbers, flags, records.source, shown(places), curves)
        table = table._without_gaps([i.name for i in needed], records, places)
        for i in needed:
            if i.name in table.columns:
                table._check(i)
        if is_measured:
            table = table._without_twins(records)
            table._check_enough(law)
        return table._with_rates(law) if STEP in law.inputs else table

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self.rows)

    @property
    def summary(self) -> str:
        """One line about what the table spans."""
        spans = [f"{len(self)} rows"]
        for name, values in self.columns.items():
            if name in _LABELS:
                spans.append(f"{len(set(self.curves.tolist()))} curves")
            else:
                spans.append(f"{name} {values.min():.4g} to {values.max():.4g}")
        return ", ".join(spans)

    def cells(self, index: int) -> dict[str, float | str]:
        """One row that is left: its number in the file and its values."""
        values = {n: str(self.curves[index]) if n in _LABELS else float(self.columns[n][index]) for n in self.mapped}
        return {"row": int(self.rows[index]), **values}

    def _keep(self, mask: np.ndarray, flags: Sequence[Flag] = ()) -> LawTable:
        columns = {name: values[mask] for name, values in self.columns.items()}
        flags = (*self.flags, *flags)
        return replace(self, columns=columns, rows=self.rows[mask], curves=self.curves[mask], flags=flags)

    def _without_gaps(self, needed: Sequence[str], records: Records, places: Mapping[str, Place]) -> LawTable:
        names = [name for name in needed if name not in _LABELS and name in self.columns]
        good = np.all([np.isfinite(self.columns[name]) for name in names], axis=0)
        if not good.any():
            raise UserError(f"{self.source}: no row has a number in each of {', '.join(self.mapped.values())}")
        read = [places[name][0] for name in names]
        flags = [Flag(r, "gap", records.gap(r, read, "a cell is empty"), True) for r in self.rows[~good].tolist()]
        return self._keep(good, flags)

    def _without_twins(self, records: Records) -> LawTable:
        """Without rows that repeat another in every column of the file, read or not."""
        number_of = dict(zip(records.numbers.tolist(), records.rows, strict=True))
        seen: dict[tuple[tuple[str, str], ...], int] = {}
        flags, keep = [], np.ones(len(self), dtype=bool)
        for index, row in enumerate(self.rows.tolist()):
            first = seen.setdefault(tuple((str(k), str(v)) for k, v in number_of[row].items()), row)
            if first != row:
                keep[index] = False
                flags.append(Flag(row, "duplicate", f"the same as row {first}", True))
        return self._keep(keep, flags)

    def _check(self, i: Input) -> None:
        values, column = self.columns[i.name], self.mapped[i.name]
        if i.name in _LABELS:
            return
        if i.name in SIZES:
            check_sizes(i.name, values, self.rows, column, self.source)
        elif i.unit in _FRACTIONS and (values.min() < 0 or values.max() > 1):
            at = int(np.argmax(np.abs(values - 0.5)))
            percent = f"; if column '{column}' is in percent, say --column {i.name}={column}:%"
            raise UserError(f"{self.source}: row {self.rows[at]}: {i.name} {values[at]:g} must be from 0 to 1{percent}")
        elif (i.unit in _ABOVE_ZERO or i.name == "loss") and values.min() <= 0:
            at = int(np.argmin(values))
            raise UserError(f"{self.source}: row {self.rows[at]}: {i.name} {values[at]:g} must be above 0 {i.unit}")

    def _check_enough(self, law: Law) -> None:
        wanted = len(law.coefficients)
        if len(self) < wanted:
            raise UserError(f"{self.source}: {len(self)} rows to fit {wanted} coefficients; give {wanted} or more")

    def _with_rates(self, law: Law) -> LawTable:
        """With the rates of each run in place of its name, and without the warm-up of a run from scratch."""
        labels, is_past = with_rates(self.columns)
        table = replace(self, columns={**self.columns, CURVE.name: labels})
        if {i.name for i in law.inputs} > {CURVE.name, STEP.name, RATE.name}:
            return table  # a continuation: what it loses while it warms up is part of the law
        flags = [Flag(int(r), "warm-up", "its rate still rises", True) for r in self.rows[~is_past]]
        return table._keep(is_past, flags)
