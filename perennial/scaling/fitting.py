"""Fits any law to a table: the best of several starts, intervals by bootstrap, and whether the rows determine it.

`fit(law, table)` returns a `Fit`, whose `predict` gives a mean, an interval and a warning outside the table's range. A
law that the rows do not determine is fitted all the same, but its `reason` says why it must not be extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from perennial.core.errors import UserError
from perennial.scaling.laws.base import Coefficients, Columns, Law, first_missing
from perennial.scaling.objective import Objective

DELTA = 1e-3
"""Residuals above it, relative errors of 0.1%, count linearly instead of squared."""
NUM_RESAMPLES = 200
LEVEL = 0.8
"""Share of outcomes that an interval means to hold: from the 10th to the 90th percentile."""
_ROUGH_STEPS = 10  # of damped Gauss-Newton, from every start
_NUM_IDLE = 2  # starts in turn that end no lower than the best
_LONGEST_SEARCH = 600  # steps of BFGS
_RESAMPLE_STEPS = 40  # from the fit's own minimum on
_KNEE = 0.7  # standard deviations; from 0.4 to 1.0, 80% intervals of coefficients cover 78 to 83%
_SAME_MINIMUM = 1e-6  # relative difference of two objectives
_TOLERANCE = 1.001  # how far outside its range an input may lie before it counts as outside


@dataclass(frozen=True)
class Prediction:
    """What a fitted law says, shape (rows,) each."""

    mean: np.ndarray
    low: np.ndarray
    """With `high`, where the law itself may lie: what the rows leave open about its coefficients."""
    high: np.ndarray
    run_low: np.ndarray
    """With `run_high`, where the result of one new run may lie: the law's interval and a run's own scatter."""
    run_high: np.ndarray
    extrapolation: np.ndarray
    """How many times outside the table's range a row lies; 1.0 inside."""
    warnings: tuple[str, ...] = ()


def interval(
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    scatter: np.ndarray | float,
    extrapolation: np.ndarray,
    warnings: tuple[str, ...],
) -> Prediction:
    """A prediction whose interval of a run adds the scatter, independent of the law's own, in squares."""
    below, above = np.maximum(mean - low, 0.0), np.maximum(high - mean, 0.0)
    return Prediction(
        mean=mean,
        low=mean - below,
        high=mean + above,
        run_low=mean - np.hypot(below, scatter),
        run_high=mean + np.hypot(above, scatter),
        extrapolation=extrapolation,
        warnings=warnings,
    )


def deviations(level: float) -> float:
    """Standard deviations on either side of the middle of a normal distribution that hold a share: 0.8 -> 1.28."""
    return float(ndtri((1 + level) / 2))


@dataclass(frozen=True)
class Fit:
    """A law with fitted coefficients, and how well the rows determine them."""

    law: Law
    coefficients: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Per coefficient, from the 10th to the 90th percentile."""
    objective: float
    """Sum of the Huber losses, ridge included."""
    mape: float
    """Mean absolute error on the rows that were fitted, %."""
    active_bounds: dict[str, str]
    """{coefficient: 'low' or 'high'} of those that stand at a bound."""
    identifiable: bool
    reason: str
    """Why not identifiable; '' when it is."""
    range: dict[str, tuple[float, float]]
    """Lowest and highest of each input in the table; 'compute' where the law measures distance by it."""
    num_rows: int
    noise: float
    """Scale of the residuals, relative to the target (or absolute where the law compares plainly)."""
    samples: np.ndarray = field(repr=False)
    """Coefficients of the bootstrap, shape (resamples, coefficients), in the law's order."""
    level: float = LEVEL
    is_relative: bool = True
    """Whether errors were compared as shares of the target."""

    def predict(self, inputs: Mapping[str, ArrayLike]) -> Prediction:
        """Mean and interval for each row. Raises UserError outside the range when the law is not identifiable."""
        columns = as_columns(inputs)
        lacking = first_missing(columns, self.law.inputs)
        if lacking:
            raise UserError(f"a prediction by this law needs '{lacking}'")
        mean = self.law.predict(columns, self.coefficients)
        outside, extrapolation = self._outside(columns, len(mean))
        if outside and not self.identifiable:
            raise UserError(f"not identifiable: {self.reason}; no prediction outside the table's range: {outside[0]}")
        draws = self.draws(columns)
        low, high = (mean, mean) if not len(draws) else np.quantile(draws, _ends(self.level), axis=0)
        scatter = deviations(self.level) * self.noise * (np.abs(mean) if self.is_relative else 1.0)
        return interval(mean, low, high, scatter, extrapolation, tuple(outside))

    def draws(self, inputs: Columns) -> np.ndarray:
        """Predictions with the coefficients of each resample, shape (resamples, rows)."""
        names = [c.name for c in self.law.coefficients]
        with np.errstate(all="ignore"):
            rows = [self.law.predict(inputs, dict(zip(names, s, strict=True))) for s in self.samples.tolist()]
        return np.array(rows)

    def _outside(self, inputs: Columns, num_rows: int) -> tuple[list[str], np.ndarray]:
        factor = np.ones(num_rows)
        warnings = []
        units = {i.name: i.unit for i in self.law.inputs}
        measured = {name: inputs[name] for name in self.range if name in inputs}
        effort = self.law.compute(inputs)
        if effort is not None and "compute" in self.range:
            measured["compute"] = effort
        for name, values in measured.items():
            low, high = self.range[name]
            over = _times_outside(np.broadcast_to(values, (num_rows,)), low, high)
            if name == "compute" or effort is None:
                factor = np.maximum(factor, over)
            worst = int(np.argmax(over))
            if over[worst] > _TOLERANCE:
                at = float(np.broadcast_to(values, (num_rows,))[worst])
                unit = units.get(name, "FLOPs")
                span = f"from {low:.4g} to {high:.4g}"
                warnings.append(f"{name} {at:.4g} {unit} lies outside the table, {span} ({over[worst]:.3g} times)")
        return warnings, factor


def fit(
    law: Law,
    table: Mapping[str, ArrayLike],
    *,
    delta: float = DELTA,
    bootstrap: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    fixed: Coefficients | None = None,
    ridge: Mapping[str, tuple[float, float]] | None = None,
    starts: Sequence[Coefficients] = (),
    residual: Literal["log", "linear"] | None = None,
    progress: Callable[[float, float, str], None] | None = None,
) -> Fit:
    """Fits a law to the columns of a table. Raises UserError for columns that are missing, odd or of no use.

    `fixed` coefficients keep their value; `ridge` adds to the law's own (see `Law.ridge`); `residual` overrides how the
    law compares (see `Law.RESIDUAL`).
    """
    columns = in_order(as_columns(table))
    _check(law, columns)
    inputs = {i.name: columns[i.name] for i in law.inputs if i.name in columns}
    target = columns[law.TARGET.name]
    ridges = {**law.ridge(), **(ridge or {})}
    objective = Objective(law, inputs, target, delta=delta, fixed=fixed, ridge=ridges, residual=residual)
    generator = np.random.default_rng(seed)
    theta, value = search(objective, [*starts, *([] if starts else law.starts(columns))], generator)
    bounds = objective.active_bounds(theta)
    reason = why_not(law, columns, objective, bounds)
    coefficients = objective.natural(theta)
    found = Fit(
        law=law,
        coefficients=coefficients,
        intervals={name: (value, value) for name, value in coefficients.items()},
        objective=value,
        mape=100 * float(np.mean(np.abs(law.predict(inputs, coefficients) / target - 1))),
        active_bounds=bounds,
        identifiable=not reason,
        reason=reason,
        range=_range(law, inputs),
        num_rows=len(target),
        noise=_scale(objective.residuals(theta), len(objective.free)),
        samples=np.empty((0, len(law.coefficients))),
        level=level,
        is_relative=objective.is_log,
    )
    return _with_intervals(found, objective, theta, bootstrap, generator, progress) if bootstrap else found


def with_intervals(
    found: Fit, table: Mapping[str, ArrayLike], *, bootstrap: int = NUM_RESAMPLES, seed: int = 0, delta: float = DELTA
) -> Fit:
    """The fit with the intervals of a bootstrap on its own table; equal seeds draw the same rows for every law."""
    columns, law = in_order(as_columns(table)), found.law
    inputs = {i.name: columns[i.name] for i in law.inputs if i.name in columns}
    objective = Objective(law, inputs, columns[law.TARGET.name], delta=delta, ridge=law.ridge())
    theta = objective.working(found.coefficients)
    return _with_intervals(found, objective, theta, bootstrap, np.random.default_rng(seed)) if bootstrap else found


def _with_intervals(
    found: Fit,
    objective: Objective,
    theta: np.ndarray,
    bootstrap: int,
    generator: np.random.Generator,
    progress: Callable[[float, float, str], None] | None = None,
) -> Fit:
    samples = resample(objective, theta, bootstrap, generator, progress)
    ends = np.quantile(samples, _ends(found.level), axis=0)
    intervals = {
        name: (min(float(a), value), max(float(b), value))
        for (name, value), a, b in zip(found.coefficients.items(), *ends, strict=True)
    }
    return replace(found, intervals=intervals, samples=samples)


def search(
    objective: Objective, starts: Sequence[Coefficients], generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """The lowest minimum found from the given starts, or from the law's published and example ones.

    Every start is followed for a few cheap steps; the best of them to the end, until two in turn bring nothing new.
    """
    law = objective.law
    points: list[Coefficients] = list(starts)
    if not points:
        wanted = {c.name for c in law.coefficients}
        points = [entry["coefficients"] for entry in [*law.PUBLISHED.values(), *law.EXAMPLES]]
        points = [point for point in points if set(point) == wanted]
    thetas = [objective.working(point) for point in points]
    if not starts:
        thetas += [t + 0.3 * generator.standard_normal(len(t)) * np.maximum(1.0, np.abs(t)) for t in thetas * 3]
    rough = [objective.polish(np.clip(t, *objective.limits), _ROUGH_STEPS) for t in thetas]
    best: tuple[np.ndarray, float] | None = None
    idle = 0
    for theta, _ in sorted(rough, key=lambda pair: pair[1]):
        found = objective.minimise(theta, max_steps=_LONGEST_SEARCH)
        idle = 0 if best is None or found[1] < best[1] * (1 - _SAME_MINIMUM) else idle + 1
        best = found if best is None or found[1] < best[1] else best
        if idle == _NUM_IDLE:
            break
    assert best is not None, "a law has a start, a published fit or an example"
    return objective.polish(best[0])


def resample(
    objective: Objective,
    theta: np.ndarray,
    count: int,
    generator: np.random.Generator,
    progress: Callable[[float, float, str], None] | None = None,
) -> np.ndarray:
    """Coefficients of `count` bootstrap refits, shape (count, coefficients).

    Where the Huber loss turns linear far below the noise, a fit is close to a median, and the bootstrap of a median is
    too wide: few rows lie near it, and a resample takes them or leaves them. Refits therefore turn linear no lower than
    at 0.7 standard deviations of the noise, where the loss is as smooth as is usual and still bounds what an outlier
    does; weights keep the balance between rows and ridge.
    Source: Fernandes, Guerre & Horta 2021, "Smoothing Quantile Regressions", J. Bus. Econ. Stat. 39 (smoothing mends
        the bootstrap of a median); Huber 1964, Ann. Math. Stat. 35 (where the loss may turn).
    """
    rows, delta, residuals = len(objective.target), objective.delta, objective.residuals(theta)
    knee = max(delta, _KNEE * _scale(residuals, len(objective.free)))
    balance = _mean_weight(residuals, delta) / _mean_weight(residuals, knee)
    samples = []
    try:
        objective.delta, objective.weights = knee, np.full(rows, balance)
        theta = objective.minimise(theta, max_steps=_RESAMPLE_STEPS)[0]
        for index in range(count):
            if progress is not None:
                progress(index, count, "resampling")
            drawn = np.bincount(generator.integers(0, rows, rows), minlength=rows)
            objective.weights = balance * drawn.astype(np.float64)
            samples.append(list(objective.natural(objective.minimise(theta, max_steps=_RESAMPLE_STEPS)[0]).values()))
    finally:
        objective.delta, objective.weights = delta, np.ones(rows)
    return np.array(samples).reshape(count, len(objective.law.coefficients))


def _mean_weight(residuals: np.ndarray, knee: float) -> float:
    """Mean weight of the rows in the least-squares problem that has the Huber loss's minimum."""
    return float(np.mean(knee / np.maximum(np.abs(residuals), knee)))


def why_not(law: Law, table: Columns, objective: Objective, bounds: Mapping[str, str]) -> str:
    """Why the rows cannot identify the law, or ''."""
    rows, wanted = len(objective.target), len(objective.free)
    for i in law.inputs:
        if i.must_vary and i.name in table and np.issubdtype(table[i.name].dtype, np.number):
            low, high = float(table[i.name].min()), float(table[i.name].max())
            if high - low <= 1e-3 * max(abs(low), abs(high)):
                return f"one value of {i.name} ({low:.4g} {i.unit})"
    refused = law.refusal(table)
    if refused:
        return refused
    if rows < law.MIN_ROWS_PER_COEFFICIENT * wanted:
        return f"{rows} rows for {wanted} coefficients"
    vanishing = {c.name: c.vanishing for c in law.coefficients}
    stuck = [f"{name} stands at its {side} bound" for name, side in bounds.items() if vanishing[name] != side]
    return ", ".join(stuck)


def as_columns(table: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """The columns as arrays with one row at least; numbers become float64."""
    columns = {}
    for name, values in table.items():
        array = np.atleast_1d(np.asarray(values))
        columns[name] = array.astype(np.float64) if np.issubdtype(array.dtype, np.number) else array
    return columns


def in_order(columns: Columns) -> dict[str, np.ndarray]:
    """The rows sorted by their values, so that no result depends on the order in which they came."""
    keys = [columns[name] for name in sorted(columns) if columns[name].dtype != object]
    order = np.lexsort(keys) if keys else slice(None)
    return {name: values[order] for name, values in columns.items()}


def _check(law: Law, columns: Columns) -> None:
    lacking = first_missing(columns, [*law.inputs, law.TARGET])
    if lacking:
        raise UserError(f"the table has no column '{lacking}'; this law reads {', '.join(i.name for i in law.inputs)}")
    target = columns[law.TARGET.name]
    wrong = ~np.isfinite(target) | ((target <= 0) if law.RESIDUAL == "log" else np.zeros(len(target), bool))
    if wrong.any():
        row = int(np.argmax(wrong))
        allowed = "a finite number above 0" if law.RESIDUAL == "log" else "a finite number"
        raise UserError(f"row {row + 1}: {law.TARGET.name} {target[row]:g} must be {allowed}")


def _range(law: Law, inputs: Columns) -> dict[str, tuple[float, float]]:
    numbers = {name: values for name, values in inputs.items() if np.issubdtype(values.dtype, np.number)}
    effort = law.compute(inputs)
    if effort is not None:
        numbers["compute"] = effort
    return {name: (float(values.min()), float(values.max())) for name, values in numbers.items()}


def _times_outside(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if low <= 0:  # no ratio to speak of: 1 + distance over width
        width = max(high - low, 1e-300)
        return 1 + np.maximum(0.0, np.maximum(values - high, low - values)) / width
    safe = np.maximum(values, 1e-300)
    return np.maximum(1.0, np.maximum(safe / high, low / safe))


def _scale(residuals: np.ndarray, num_free: int) -> float:
    """Standard deviation of the residuals by their median size, allowing for the rows that the fit passes through."""
    spare = max(1, len(residuals) - num_free)
    return float(1.4826 * np.median(np.abs(residuals)) * len(residuals) / spare)


def _ends(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def describe(result: Fit) -> dict[str, Any]:
    """The fit as JSON-ready data, without its samples."""
    names = ("coefficients", "intervals", "objective", "mape", "active_bounds", "identifiable", "reason", "range")
    return {name: vars(result)[name] for name in names} | {"num_rows": result.num_rows, "noise": result.noise}
