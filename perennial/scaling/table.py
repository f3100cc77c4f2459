"""A table of runs for the laws of loss: sizes, tokens and losses in natural units, and what is odd about each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.scaling.fitting import fit
from perennial.scaling.laws.base import Law
from perennial.scaling.laws.chinchilla import Chinchilla
from perennial.scaling.reading import Place, Records, shown
from perennial.scaling.two_terms import FLOPS_PER_TOKEN_AND_PARAMETER, groups, refusal

SIZES = ("parameters", "tokens", "unique_tokens", "flops")
NUMBERS = (*SIZES, "loss", "learning_rate", "batch", "weight_decay", "replay", "seed")
LABELS = ("schedule", "domain")
FEWEST_ROWS = 5
UNDER_TRAINED = 10.0
"""Tokens per parameter below which warm-up rules the result."""
_SMALLEST = 1e3  # parameters or tokens; a column that stays below is in millions or billions
_WIDEST = 1e8  # largest over smallest within one column, if the smallest is below _SMALLEST
_OUTLIER_DEVIATIONS, _OUTLIER_SHARE = 8.0, 0.02
_OFF_DEVIATIONS, _OFF_SHARE = 3.0, 0.02
_FEWEST_FOR_CHECKS = 12
_WORSE_SHARE = 0.02  # far above what repeats of one run differ by
_OTHER_FLOPS = 2.0  # ways to count the FLOPs of a run, with attention and embeddings or without, rarely differ by more


@dataclass(frozen=True)
class Flag:
    """Something odd about one row, or about a column."""

    row: int | None
    """As in the file: 1 is the first below the header. None: of all rows."""
    kind: str
    """'no loss', 'no size', 'gap', 'duplicate', 'worse', 'under-trained', 'outlier' or 'warm-up'; of all rows 'other
    column' or 'FLOPs'."""
    text: str
    is_dropped: bool


@dataclass(frozen=True)
class RunTable:
    """Columns of runs in natural units, shape (rows,) each, and the flags that reading them raised."""

    columns: dict[str, np.ndarray]
    rows: np.ndarray
    """Number in the file of each row that is left."""
    flags: tuple[Flag, ...] = ()
    source: str = ""
    mapped: dict[str, str] = field(default_factory=dict)
    """{meaning: 'column:unit'} of what was read."""

    @classmethod
    def read(
        cls,
        paths: Path | Sequence[Path],
        mappings: Sequence[str] = (),
        *,
        where: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> RunTable:
        """The runs in a file or several, checked. Raises UserError that names what makes the table useless.

        `where` keeps the rows of 'column=value' texts; `drop` leaves out flagged 'outliers' or 'under-trained' rows, or
        all that are 'worse' than the best of equal size and tokens.
        """
        records = Records.read(paths, where)
        places = records.places(mappings, (*NUMBERS, *LABELS))
        if "loss" not in places:
            raise records.lacks("loss", "nats per token")
        columns, needed = {}, {"loss", *SIZES, *(text.partition("=")[0] for text in mappings)}
        for name, place in places.items():
            try:
                columns[name] = records.labels_of(place) if name in LABELS else records.numbers_of(place)
            except UserError:
                if name in needed:
                    raise
        unread = {"flops"} if {"parameters", "tokens"} <= columns.keys() else set()
        read = {name: places[name] for name in (*SIZES, "loss") if name in columns and name not in unread}
        _check_one_domain(columns, records.source)
        flags = [Flag(None, "other column", text, False) for text in records.rivals(places, mappings, read)]
        if unread and "flops" in columns:
            flags += _other_flops(columns, places)
        table = cls(columns, records.numbers, tuple(flags), records.source, shown(read))
        table = table._with_losses(records, places)._with_sizes(records, places)
        return table._without_twins()._flag_worse(drop)._checked(drop)

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self.rows)

    @property
    def summary(self) -> str:
        """One line about what the table spans."""
        size, tokens = self.columns["parameters"], self.columns["tokens"]
        sizes = groups(size).max() + 1
        return (
            f"{len(self)} rows, {sizes} sizes from {human(size.min())} to {human(size.max())} parameters, "
            f"{human(tokens.min())} to {human(tokens.max())} tokens"
        )

    def _keep(self, mask: np.ndarray, flags: Sequence[Flag] = ()) -> RunTable:
        columns = {name: values[mask] for name, values in self.columns.items()}
        return replace(self, columns=columns, rows=self.rows[mask], flags=(*self.flags, *flags))

    def _with_losses(self, records: Records, places: Mapping[str, Place]) -> RunTable:
        """Without the rows that have no loss. Raises UserError for a loss of 0 or less."""
        loss = self.columns["loss"]
        wrong = loss <= 0
        if wrong.any():
            at = int(np.argmax(wrong))
            raise UserError(f"{self.source}: row {self.rows[at]}: loss {loss[at]:g} must be above 0 nats per token")
        good = np.isfinite(loss)
        column = [places["loss"][0]]
        flags = [Flag(r, "no loss", records.gap(r, column, "no finite loss"), True) for r in self.rows[~good].tolist()]
        return self._keep(good, flags)

    def _with_sizes(self, records: Records, places: Mapping[str, Place]) -> RunTable:
        """With the third of parameters, tokens and FLOPs where two are given: C = 6 N D."""
        table, columns = self, dict(self.columns)
        six = FLOPS_PER_TOKEN_AND_PARAMETER
        if "tokens" not in columns and {"parameters", "flops"} <= columns.keys():
            columns["tokens"] = columns["flops"] / (six * columns["parameters"])
        elif "parameters" not in columns and {"tokens", "flops"} <= columns.keys():
            columns["parameters"] = columns["flops"] / (six * columns["tokens"])
        for name in ("parameters", "tokens"):
            if name not in columns:
                raise records.lacks(name, f"in single {name}, or with a unit such as M")
        columns["flops"] = six * columns["parameters"] * columns["tokens"]  # as the laws count, whatever was recorded
        table = replace(table, columns=columns)
        sizes = [n for n in SIZES if n in columns]
        good = np.all([np.isfinite(columns[n]) for n in sizes], axis=0)
        read = [places[name][0] for name in sizes if name in self.mapped]
        gaps = [Flag(r, "no size", records.gap(r, read, "a size is missing"), True) for r in self.rows[~good].tolist()]
        table = table._keep(good, gaps)
        for name in sizes:
            check_sizes(name, table.columns[name], table.rows, table.mapped.get(name, name), self.source)
        return table

    def _without_twins(self) -> RunTable:
        """Without rows that repeat another in every column."""
        seen: dict[tuple[Any, ...], int] = {}
        flags, keep = [], np.ones(len(self), dtype=bool)
        for index, key in enumerate(zip(*self.columns.values(), strict=True)):
            first = seen.setdefault(key, int(self.rows[index]))
            if first != self.rows[index]:
                keep[index] = False
                flags.append(Flag(int(self.rows[index]), "duplicate", f"the same as row {first}", True))
        return self._keep(keep, flags)

    def _flag_worse(self, drop: Sequence[str]) -> RunTable:
        """Rows well above the best of their size and tokens: a sweep of something else, which no law here knows of."""
        names = [n for n in ("parameters", "tokens", "unique_tokens") if n in self.columns]
        keys = list(zip(*(self.columns[n].tolist() for n in names), strict=True))
        loss, best = self.columns["loss"].tolist(), dict[tuple[float, ...], float]()
        for key, value in zip(keys, loss, strict=True):
            best[key] = min(value, best.get(key, value))
        above = np.array([value / best[key] - 1 for key, value in zip(keys, loss, strict=True)])
        is_dropped = "worse" in drop
        worse = above > (0 if is_dropped else _WORSE_SHARE)
        flags = [
            Flag(int(r), "worse", f"loss {x:.1%} above the best row of equal size and tokens", is_dropped)
            for r, x in zip(self.rows[worse], above[worse], strict=True)
        ]
        return self._keep(~worse if is_dropped else np.ones(len(self), dtype=bool), flags)

    def _checked(self, drop: Sequence[str]) -> RunTable:
        """With flags on outliers and on under-trained rows. Raises UserError for designs that identify nothing."""
        if len(self) < FEWEST_ROWS:
            raise UserError(f"{self.source}: {len(self)} rows to fit; {FEWEST_ROWS} are the fewest that tell anything")
        refused = refusal(self.columns)
        if refused:
            raise UserError(f"{self.source}: not identifiable: {refused}")
        table = self._flag_under_trained(drop)
        return table._flag_outliers(drop)

    def _flag_under_trained(self, drop: Sequence[str]) -> RunTable:
        """Rows below 10 tokens per parameter are dropped where they lie off the law of the others."""
        ratio = self.columns["tokens"] / self.columns["parameters"]
        low = ratio < UNDER_TRAINED
        rest = ~low
        if not low.any():
            return self
        off, text = "under-trained" in drop, ""
        if not off and rest.sum() >= _FEWEST_FOR_CHECKS and _is_usable(self.columns, rest):
            residuals, noise = self._residuals(rest)
            typical = float(np.median(np.abs(residuals[low])))
            off = typical > max(_OFF_DEVIATIONS * noise, _OFF_SHARE)
            text = f"; such rows lie {typical:.1%} off the law of the others" if off else ""
        flags = [
            Flag(int(r), "under-trained", f"{x:.2g} tokens per parameter{text}", off)
            for r, x in zip(self.rows[low], ratio[low], strict=True)
        ]
        return self._keep(rest if off else np.ones(len(self), dtype=bool), flags)

    def _flag_outliers(self, drop: Sequence[str]) -> RunTable:
        if len(self) < _FEWEST_FOR_CHECKS or _repeats(self.columns):
            return self
        residuals, noise = self._residuals(np.ones(len(self), dtype=bool))
        far = np.abs(residuals) > max(_OUTLIER_DEVIATIONS * noise, _OUTLIER_SHARE)
        flags = [
            Flag(int(r), "outlier", f"loss {-x:+.1%} off the law of the table", "outliers" in drop)
            for r, x in zip(self.rows[far], residuals[far], strict=True)
        ]
        return self._keep(~far if "outliers" in drop else np.ones(len(self), dtype=bool), flags)

    def _residuals(self, known: np.ndarray) -> tuple[np.ndarray, float]:
        """ln of predicted over measured loss of every row by the law of some, and the noise of those."""
        part = {name: self.columns[name][known] for name in ("parameters", "tokens", "loss")}
        found = fit(Chinchilla(), part, bootstrap=0)
        predicted = found.law.predict(self.columns, found.coefficients)
        return np.log(predicted / self.columns["loss"]), found.noise


def is_of_runs(law: Law) -> bool:
    """Whether a law gives the loss by size and tokens, and unique tokens at most: what such a table holds."""
    names = {i.name for i in law.inputs}
    return law.TARGET.name == "loss" and {"parameters", "tokens"} <= names <= {*SIZES}


def check_sizes(name: str, values: np.ndarray, rows: np.ndarray, column: str, source: str) -> None:
    """Raises UserError for numbers of 0 or less, for mixed units and for numbers that want a unit."""
    if not len(values):
        return
    if values.min() <= 0:
        at = int(np.argmin(values))
        raise UserError(f"{source}: row {rows[at]}: {name} {values[at]:g} must be above 0")
    low, high = float(values.min()), float(values.max())
    if low < _SMALLEST and high > low * _WIDEST:
        raise UserError(
            f"{source}: mixed units in column '{column}': {name} from {low:.3g} to {high:.3g}; "
            "write all rows in one unit"
        )
    if high < _SMALLEST and name != "flops":
        raise UserError(
            f"{source}: {name} of {low:.3g} to {high:.3g} are too few; if column '{column}' is in millions or "
            f"billions, say --column {name}={column.partition(':')[0]}:M or :B"
        )


def _check_one_domain(columns: dict[str, np.ndarray], source: str) -> None:
    """Raises UserError for losses of several domains: no law holds for all of them."""
    domains = sorted(set(columns.get("domain", np.array([])).tolist()))
    if len(domains) > 1:
        raise UserError(
            f"{source}: losses of {len(domains)} domains ({', '.join(domains[:5])}); "
            "choose one with --where COLUMN=VALUE"
        )


def _other_flops(columns: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> list[Flag]:
    """What to say of FLOPs that are given beside parameters and tokens and are far from 6 N D, which the laws count."""
    counted = FLOPS_PER_TOKEN_AND_PARAMETER * columns["parameters"] * columns["tokens"]
    known = (columns["flops"] > 0) & (counted > 0)
    ratio = float(np.median(columns["flops"][known] / counted[known])) if known.any() else 1.0
    if 1 / _OTHER_FLOPS <= ratio <= _OTHER_FLOPS:
        return []
    size, tokens, flops = (places[name][0] for name in ("parameters", "tokens", "flops"))
    text = f"'{flops}' is {ratio:.2g} times 6 N D in the median row; read were '{size}' and '{tokens}', not '{flops}'"
    return [Flag(None, "FLOPs", text, False)]


def _is_usable(columns: dict[str, np.ndarray], mask: np.ndarray) -> bool:
    return refusal({name: values[mask] for name, values in columns.items()}) is None and not _repeats(columns)


def _repeats(columns: dict[str, np.ndarray]) -> bool:
    return "unique_tokens" in columns and bool((columns["tokens"] > 1.05 * columns["unique_tokens"]).any())
