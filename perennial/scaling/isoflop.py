"""The best size per budget from runs of equal compute: a parabola through the five runs around each minimum.

Formula: per budget C a parabola in ln N through the points around the lowest loss; its minimum is N*(C). Then
    N* = k * C^a by linear regression in logarithms. C in FLOPs, N parameters.
Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556, section 3.2
    (approach 2); Porian et al. 2024, "Resolving Discrepancies in Compute-Optimal Scaling of Language Models",
    arXiv 2406.19146.
Differs: five points instead of the whole arc, whose far ends pull the exponent by up to 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perennial.core.errors import UserError
from perennial.scaling.two_terms import SAME_BUDGET, groups

NUM_POINTS = 5
"""Rows of a budget that the parabola is fitted to."""


@dataclass(frozen=True)
class Frontier:
    """Best sizes per budget and the power law through them: N* = exp(intercept) * C^exponent."""

    flops: np.ndarray
    parameters: np.ndarray
    loss: np.ndarray
    exponent: float
    exponent_interval: tuple[float, float]
    """From the 10th to the 90th percentile over resampled rows of every budget."""
    intercept: float


def fit_isoflop(
    flops: np.ndarray,
    parameters: np.ndarray,
    loss: np.ndarray,
    *,
    num_points: int = NUM_POINTS,
    bootstrap: int = 200,
    seed: int = 0,
) -> Frontier:
    """The best size of each budget, shape (rows,) each; budgets without a minimum inside their sizes are left out.

    Raises UserError when fewer than two budgets have a minimum.
    """
    size, loss = np.asarray(parameters, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    flops = np.asarray(flops, dtype=np.float64)
    labels = groups(flops, same=SAME_BUDGET)
    parts = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    found = _minima(parts, flops, size, loss, num_points)
    if len(found) < 2:
        raise UserError(f"not identifiable: {len(found)} budgets with a minimum inside their sizes; two are needed")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(bootstrap):
        again = _minima([np.unique(generator.choice(p, len(p))) for p in parts], flops, size, loss, num_points)
        if len(again) >= 2:
            draws.append(np.polyfit(np.log(again[:, 0]), np.log(again[:, 1]), 1)[0])
    exponent, intercept = np.polyfit(np.log(found[:, 0]), np.log(found[:, 1]), 1)
    low, high = np.quantile(draws, [0.1, 0.9]) if draws else (exponent, exponent)
    budgets, sizes, losses = found.T
    return Frontier(budgets, sizes, losses, float(exponent), (float(low), float(high)), float(intercept))


def _minima(
    parts: list[np.ndarray], flops: np.ndarray, size: np.ndarray, loss: np.ndarray, num_points: int
) -> np.ndarray:
    """Budget, best size and its loss for each part that has a minimum, shape (budgets, 3)."""
    found = []
    for part in parts:
        best = minimum(size[part], loss[part], num_points=num_points)
        if best is not None:
            found.append((float(np.exp(np.log(flops[part]).mean())), *best))
    return np.array(found).reshape(-1, 3)


def minimum(size: np.ndarray, loss: np.ndarray, *, num_points: int = NUM_POINTS) -> tuple[float, float] | None:
    """(size, loss) at the bottom of one budget's parabola; None when it has none among the sizes."""
    order = np.argsort(size)
    x, y = np.log(size[order]), loss[order]
    lowest = int(np.argmin(y))
    if lowest in (0, len(x) - 1):
        return None
    around = slice(max(0, lowest - num_points // 2), lowest + num_points // 2 + 1)
    x, y = x[around], y[around]
    middle = x.mean()
    p2, p1, p0 = np.polyfit(x - middle, y, 2)
    if p2 <= 0:
        return None
    bottom = -p1 / (2 * p2)
    if not x[0] <= bottom + middle <= x[-1]:
        return None
    return float(np.exp(bottom + middle)), float(p0 + p1 * bottom + p2 * bottom**2)
