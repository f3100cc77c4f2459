"""The law of loss for a table whose form nobody knows: several forms, weighted by how well they foretell.

Each form is fitted without the top 30% of compute, and again without the top 30% of sizes (and of epochs, where data
repeat), and predicts what was left out. The answer is the mean of all forms, fitted to every row, weighted by
1 / error^2 of those predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.scaling import two_terms
from perennial.scaling.fitting import (
    LEVEL,
    NUM_RESAMPLES,
    Fit,
    Prediction,
    as_columns,
    describe,
    deviations,
    fit,
    interval,
    with_intervals,
)
from perennial.scaling.laws.base import Columns, Law, column

LEFT_OUT_SHARE = 0.3
"""Share of the rows, the dearest or the largest, on which forms are judged."""
FRESH: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("chinchilla", {}), ("tied", {})),
    *(("gamma", {"strength": strength}) for strength in (1e-3, 1e-4, 1e-5)),
    *(("tied_gamma", {"strength": strength}) for strength in (1e-4, 1e-5)),
    ("farseer", {}),
)
"""Forms for data seen once: (law, settings)."""
REPEATING: tuple[tuple[str, dict[str, Any]], ...] = (("repeated", {}), ("repeat_penalty", {}), ("chinchilla", {}))
"""Forms for data seen several times."""
_LEAST_ERROR = 1e-5  # below any noise: exact data must not divide by zero
_MIN_LEFT_OUT = 2
_FURTHEST = 3.0  # beyond three times the distance that was tried, growth of the error is anybody's guess
_SHORTEST = 0.1  # ln(compute): parts left out by size may lie within the compute of the rest


@dataclass(frozen=True)
class Member:
    """One form of a blend."""

    name: str
    fit: Fit
    weight: float
    left_out_mape: tuple[float, ...]
    """Mean absolute error, %, on each part that was left out; empty where the rows were too few to leave any out."""


@dataclass(frozen=True)
class Blend:
    """Several fitted forms and their weights; predicts as a `Fit` does."""

    members: tuple[Member, ...]
    """Largest weight first."""
    mape: float
    """Mean absolute error on the rows that were fitted, %."""
    left_out_mape: float | None
    """The same of the blend on what was left out; None when nothing could be."""

    stray: float
    """How far, relative to the loss, the blend strayed on what was left out, beyond the noise of the runs."""
    reach: float
    """How far outside the rest that was: the mean of ln(compute / largest compute)."""

    @property
    def best(self) -> Member:
        """The form with the largest weight."""
        return self.members[0]

    @property
    def identifiable(self) -> bool:
        """Whether the rows determine the forms that take part."""
        return self.best.fit.identifiable

    @property
    def reason(self) -> str:
        """Why not identifiable; '' when it is."""
        return self.best.fit.reason

    @property
    def range(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest of each input in the table."""
        return self.best.fit.range

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.best.fit.num_rows

    @property
    def level(self) -> float:
        """Share of outcomes that an interval means to hold."""
        return self.best.fit.level

    def predict(self, inputs: Mapping[str, ArrayLike]) -> Prediction:
        """Mean and interval; the interval holds what the resamples and the forms disagree on."""
        columns = as_columns(inputs)
        single = [member.fit.predict(columns) for member in self.members]
        weights = np.array([member.weight for member in self.members])
        means = np.array([p.mean for p in single])
        mean = weights @ means
        between = np.sqrt(weights @ (means - mean) ** 2)
        draws = _weighted([member.fit.draws(columns) for member in self.members], weights)
        if draws is None:
            low = high = mean
        else:
            low, high = np.quantile(draws, [(1 - self.level) / 2, (1 + self.level) / 2], axis=0)
        below, above = np.maximum(mean - low, 0), np.maximum(high - mean, 0)
        further = np.log(single[0].extrapolation) / max(self.reach, 1e-9)
        strayed = self.stray * np.minimum(further, _FURTHEST)
        scatter = deviations(self.level) * mean * np.hypot(self.best.fit.noise, strayed)
        low, high = mean - np.hypot(below, between), mean + np.hypot(above, between)
        return interval(mean, low, high, scatter, single[0].extrapolation, single[0].warnings)


def _weighted(draws: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray | None:
    """Weighted mean of the forms' draws; each resample is the same rows for every form."""
    count = min(len(d) for d in draws)
    return None if count == 0 else np.tensordot(weights, np.array([d[:count] for d in draws]), axes=1)


def fit_loss_law(
    table: Mapping[str, ArrayLike],
    *,
    form: str = "auto",
    bootstrap: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    progress: Callable[[float, float, str], None] | None = None,
) -> Fit | Blend:
    """Fits a law of loss by its name, or the blend of all that suit the table ('auto').

    Columns: parameters, tokens, loss, and unique_tokens where data repeat. Raises UserError for a table or form that
    is of no use.
    """
    columns = as_columns(table)
    if form != "auto":
        return fit(plugins.load("laws", form)(), columns, bootstrap=bootstrap, seed=seed, level=level)
    candidates = [(name, plugins.load("laws", name)(**settings)) for name, settings in _forms(columns)]
    return blend(candidates, columns, bootstrap=bootstrap, seed=seed, level=level, progress=progress)


def blend(
    candidates: Sequence[tuple[str, Law]],
    columns: Columns,
    *,
    bootstrap: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    progress: Callable[[float, float, str], None] | None = None,
) -> Blend:
    """The blend of given forms. Raises UserError when not one of them can be fitted."""
    candidates = [(name, law) for name, law in candidates if _has_enough_rows(law, columns)] or list(candidates[:1])
    masks = left_out(columns)
    full = [(name, fit(law, columns, bootstrap=0, seed=seed, level=level)) for name, law in candidates]
    identifiable = [pair for pair in full if pair[1].identifiable] or full[:1]
    foretold = [_foretell(f, columns, masks, seed) for _, f in identifiable]
    weights = _weights(foretold, columns, masks)
    members = []
    for index, ((name, found), errors, weight) in enumerate(zip(identifiable, foretold, weights, strict=True)):
        if progress is not None:
            progress(index, len(identifiable), f"resampling {name}")
        again = with_intervals(found, columns, bootstrap=bootstrap, seed=seed)
        shown = tuple(_mape(p, column(columns, "loss")[m]) for p, m in zip(errors, masks, strict=True))
        members.append(Member(name, again, float(weight), shown))
    together = sum(m.weight * m.fit.law.predict(columns, m.fit.coefficients) for m in members)
    members.sort(key=lambda member: -member.weight)
    loss = column(columns, "loss")
    ahead = [sum(w * p[i] for w, p in zip(weights, foretold, strict=True)) / loss[m] - 1 for i, m in enumerate(masks)]
    left = float(np.mean([100 * np.abs(e).mean() for e in ahead])) if masks else None
    stray, reach = _stray(ahead, columns, masks, members[0].fit.noise)
    return Blend(tuple(members), _mape(together, loss), left, stray, reach)


def _stray(
    ahead: Sequence[np.ndarray], columns: Columns, masks: Sequence[np.ndarray], noise: float
) -> tuple[float, float]:
    """(relative error of the blend on what was left out, without the noise; mean ln of how far out that was)."""
    if not masks:
        return 0.0, 1.0
    cost = np.log(two_terms.compute(columns))
    squares = np.mean([np.mean(e**2) for e in ahead])
    reach = np.mean([np.maximum(cost[mask] - cost[~mask].max(), 0.0).mean() for mask in masks])
    return float(np.sqrt(max(0.0, squares - noise**2))), float(max(reach, _SHORTEST))


def left_out(columns: Columns) -> list[np.ndarray]:
    """Masks of the rows to judge by: the top 30% of compute, of sizes, and of epochs where data repeat."""
    values = [two_terms.compute(columns), column(columns, "parameters")]
    if _repeats(columns):
        values.append(column(columns, "tokens") / column(columns, "unique_tokens"))
    masks = [v > np.quantile(v, 1 - LEFT_OUT_SHARE) for v in values]
    rows = len(values[0])
    return [m for m in masks if m.sum() >= _MIN_LEFT_OUT and rows - m.sum() >= 6 and _is_design(columns, ~m)]


def _is_design(columns: Columns, mask: np.ndarray) -> bool:
    return two_terms.refusal({name: values[mask] for name, values in columns.items()}) is None


def _foretell(found: Fit, columns: Columns, masks: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """What the form predicts for each part when it is fitted without it."""
    predictions = []
    for mask in masks:
        kept = {name: values[~mask] for name, values in columns.items()}
        starts = [found.coefficients, *found.law.starts(kept)[:1]]
        again = fit(found.law, kept, bootstrap=0, seed=seed, starts=starts)
        rest = {name: values[mask] for name, values in columns.items()}
        predictions.append(again.law.predict(rest, again.coefficients))
    return predictions


def _weights(foretold: Sequence[Sequence[np.ndarray]], columns: Columns, masks: Sequence[np.ndarray]) -> np.ndarray:
    """1 / error^2, scaled to a sum of 1; the error is the root mean square over the parts left out."""
    loss = column(columns, "loss")
    errors = np.array([[_mape(p, loss[m]) for p, m in zip(parts, masks, strict=True)] for parts in foretold])
    if errors.size == 0:
        return np.full(len(foretold), 1 / len(foretold))
    squares = np.maximum((errors**2).mean(axis=1), (100 * _LEAST_ERROR) ** 2)
    return (1 / squares) / (1 / squares).sum()


def _has_enough_rows(law: Law, columns: Columns) -> bool:
    return len(columns["loss"]) >= law.MIN_ROWS_PER_COEFFICIENT * (len(law.coefficients) + 1)


def _repeats(columns: Columns) -> bool:
    return "unique_tokens" in columns and two_terms.refusal_of_repeats(columns) is None


def _forms(columns: Columns) -> Sequence[tuple[str, dict[str, Any]]]:
    for name in ("parameters", "tokens", "loss"):
        if name not in columns:
            raise UserError(f"the table has no column '{name}'; a law of loss needs parameters, tokens and loss")
    return REPEATING if _repeats(columns) else FRESH


def _mape(predicted: Any, measured: np.ndarray) -> float:
    return 100 * float(np.mean(np.abs(predicted / measured - 1)))


def describe_blend(result: Blend) -> dict[str, Any]:
    """The blend as JSON-ready data, without samples."""
    forms = [
        {"form": m.name, "weight": m.weight, "left_out_mape": list(m.left_out_mape), **describe(m.fit)}
        for m in result.members
    ]
    return {"form": "auto", "mape": result.mape, "left_out_mape": result.left_out_mape, "members": forms}
