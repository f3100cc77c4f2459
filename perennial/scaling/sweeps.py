"""Best learning rate and batch from sweeps over both, and their power laws of model size and tokens.

Each sweep varies learning rate and batch at one size and number of tokens. Near its best run the loss is a paraboloid
in the logarithms of both; its minimum is far better determined than the best run itself.

Source: Li et al. 2025, "Predictable Scale: Part I, Step Law", arXiv 2503.04715, sections 3 and 4 (the surface is
    convex, its minima follow power laws).
Differs: minima of a quadratic through the runs within 1% of the best.
Limits: the minimum must lie inside the sweep; those that do not are left out and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import CloughTocher2DInterpolator

from perennial.core.errors import UserError
from perennial.scaling.batch import LEAST_SQUARES
from perennial.scaling.fitting import Fit, as_columns, fit
from perennial.scaling.laws.base import Columns, column
from perennial.scaling.laws.batch_size import BatchSize
from perennial.scaling.laws.learning_rate import LearningRate

TOLERANCE = 0.01
"""Runs whose loss is at most 1% above the best: where a quadratic fits; wider, it is bent, narrower, it is noise."""
_FEWEST_RUNS = 8  # for the six coefficients of a quadratic in two variables


@dataclass(frozen=True)
class SweepMinimum:
    """Where the loss of one sweep is lowest."""

    learning_rate: float
    batch: float
    """In the unit of the table."""
    loss: float
    num_runs: int
    """Runs that the quadratic went through."""
    problem: str
    """Why it cannot be trusted; '' when it can."""


@dataclass(frozen=True)
class SweepLaws:
    """Power laws of the best learning rate and batch, and the minima that they go through."""

    learning_rate: Fit
    batch: Fit
    minima: dict[tuple[float, float], SweepMinimum]
    """By (parameters, tokens)."""


def sweep_minimum(
    learning_rates: ArrayLike, batches: ArrayLike, losses: ArrayLike, *, tolerance: float = TOLERANCE
) -> SweepMinimum:
    """Minimum of a quadratic in ln rate and ln batch through the runs within `tolerance` of the best, shape (runs,)."""
    points = np.log(np.stack([np.asarray(learning_rates), np.asarray(batches)], axis=1).astype(np.float64))
    loss = np.asarray(losses, dtype=np.float64)
    best = int(np.argmin(loss))
    near = loss <= loss[best] * (1 + tolerance)
    count = int(near.sum())
    rate, batch = np.exp(points[best]).tolist()
    given_up = SweepMinimum(rate, batch, float(loss[best]), count, "")
    if count < _FEWEST_RUNS:
        return replace(given_up, problem=f"{count} runs within {tolerance:.1%} of the best, {_FEWEST_RUNS} needed")
    middle = points[near].mean(axis=0)
    x, y = (points[near] - middle).T
    design = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    c, _, rank, _ = np.linalg.lstsq(design, loss[near], rcond=1e-9)
    if rank < design.shape[1]:  # two rates or two batches alone: any bend would do
        return replace(given_up, problem="the runs near the best have fewer than three rates, or three batches")
    bend = np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    if np.linalg.eigvalsh(bend)[0] <= 0:
        return replace(given_up, problem="the loss does not bend upward in both directions")
    offset = -np.linalg.solve(bend, c[1:3])
    place = middle + offset
    if (place < points.min(axis=0)).any() or (place > points.max(axis=0)).any():
        return replace(given_up, problem="the minimum lies outside the sweep")
    lowest = float(c[0] + c[1:3] @ offset / 2)
    rate, batch = np.exp(place).tolist()
    return SweepMinimum(rate, batch, lowest, count, "")


def fit_lr_batch(
    table: Mapping[str, ArrayLike], *, tolerance: float = TOLERANCE, bootstrap: int = 0, seed: int = 0
) -> SweepLaws:
    """Power laws from a table of runs: columns parameters, tokens, learning_rate, batch (tokens) and loss.

    Rows with the same parameters and tokens are one sweep. Raises UserError when fewer than three have a minimum.
    """
    columns = as_columns(table)
    minima = {}
    for key, rows in sweeps(columns):
        values = (column(columns, name)[rows] for name in ("learning_rate", "batch", "loss"))
        minima[key] = sweep_minimum(*values, tolerance=tolerance)
    good = {key: found for key, found in minima.items() if not found.problem}
    if len(good) < 3:
        problems = "; ".join(
            f"{n:.3g} parameters, {d:.3g} tokens: {m.problem}" for (n, d), m in minima.items() if m.problem
        )
        raise UserError(f"{len(good)} of {len(minima)} sweeps have a minimum inside, 3 are needed. {problems}".strip())
    shape = np.array(list(good))
    inputs = {"parameters": shape[:, 0], "tokens": shape[:, 1]}
    rates = np.array([found.learning_rate for found in good.values()])
    batches = np.array([found.batch for found in good.values()])
    least_squares = partial(fit, delta=LEAST_SQUARES, bootstrap=bootstrap, seed=seed)
    return SweepLaws(
        learning_rate=least_squares(LearningRate(), {**inputs, "learning_rate": rates}),
        batch=least_squares(BatchSize(), {**inputs, "batch": batches}),
        minima=minima,
    )


def sweeps(columns: Columns) -> Iterator[tuple[tuple[float, float], np.ndarray]]:
    """((parameters, tokens), which rows) of each sweep."""
    keys = np.stack([column(columns, "parameters"), column(columns, "tokens")], axis=1)
    for key in np.unique(keys, axis=0):
        yield (float(key[0]), float(key[1])), (keys == key).all(axis=1)


def excess_loss(
    learning_rates: ArrayLike, batches: ArrayLike, losses: ArrayLike, *, learning_rate: float, batch: float
) -> float:
    """How far above the sweep's best run the loss at a rate and batch lies, as a share: 0.001 is 0.1%.

    A smooth surface through the runs in ln rate and ln batch is read there, or at the sweep's nearest edge; nan where
    the sweep has a gap.
    """
    points = np.log(np.stack([np.asarray(learning_rates), np.asarray(batches)], axis=1).astype(np.float64))
    loss = np.asarray(losses, dtype=np.float64)
    place = np.clip(np.log([learning_rate, batch]), points.min(axis=0), points.max(axis=0))
    return float(CloughTocher2DInterpolator(points, loss)(place[None])[0] / loss.min() - 1)
