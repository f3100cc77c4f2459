"""The best size and number of tokens for a budget under a fitted law of loss, and how much that choice matters.

Formula: for L = E + A / N^alpha + B / D^beta under C = 6 N D, N* = G (C / 6)^(beta / (alpha + beta)),
    D* = C / (6 N*), G = (alpha A / (beta B))^(1 / (alpha + beta)). Any other law, a cap on size, unique tokens that
    repeat, or tokens that the finished model will serve (2 N FLOPs each) are searched along N.
Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556, Eq. 4; Sardana et al.
    2024, "Beyond Chinchilla-Optimal: Accounting for Inference in Language Model Scaling Laws", arXiv 2401.00448, Eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.scaling.choosing import Blend
from perennial.scaling.fitting import Fit
from perennial.scaling.laws.base import Coefficients
from perennial.scaling.two_terms import FLOPS_PER_TOKEN_AND_PARAMETER

INFERENCE_FLOPS = 2.0
"""Per parameter and token served: forward only."""
NEAR_OPTIMAL = 0.002
"""Relative rise of the loss that still counts as optimal; repeats of one run differ by about a tenth of it."""
_COARSE, _FINE = 241, 81  # points of the search over ln N, and of each refinement
_REFINEMENTS = 3
_SMALLEST = 1e3  # parameters


@dataclass(frozen=True)
class Allocation:
    """How to spend a budget."""

    parameters: float
    tokens: float
    epochs: float | None
    """Tokens over unique tokens, where those are given."""
    loss: float
    loss_interval: tuple[float, float]
    parameters_interval: tuple[float, float]
    tokens_per_parameter_interval: tuple[float, float]
    near_optimal: tuple[float, float]
    """Sizes between which the loss rises by less than 0.2%, the rest of the budget going to tokens."""
    flops: float
    """Of training alone."""
    extrapolation: float
    warnings: tuple[str, ...]

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


def closed_form(coefficients: Coefficients, flops: float) -> tuple[float, float]:
    """(N*, D*) of the two-term law; with one exponent, both grow as the square root of compute."""
    alpha, beta = coefficients["alpha"], coefficients.get("beta", coefficients["alpha"])
    log_ratio = math.log(alpha * coefficients["A"]) - math.log(beta * coefficients["B"])
    pairs = flops / FLOPS_PER_TOKEN_AND_PARAMETER
    size = math.exp((log_ratio + beta * math.log(pairs)) / (alpha + beta))
    return size, pairs / size


def optimal(
    fitted: Fit | Blend,
    flops: float,
    *,
    unique_tokens: float | None = None,
    max_parameters: float | None = None,
    inference_tokens: float = 0.0,
) -> Allocation:
    """The size and tokens of the lowest loss for a budget of FLOPs, which pays for inference as well.

    Raises UserError for a budget of nothing and, outside the table, for a law that its rows do not identify.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"a budget of {flops:g} FLOPs buys nothing; it must be finite and more than 0")
    largest = min(max_parameters or math.inf, _most_parameters(flops, inference_tokens))
    if largest < _SMALLEST:
        raise UserError(f"{human(flops, 'FLOPs')} do not pay for a model of {_SMALLEST:.0f} parameters")

    def rows(size: np.ndarray) -> dict[str, np.ndarray]:
        tokens = tokens_for(flops, size, inference_tokens)
        table = {"parameters": size, "tokens": tokens}
        if unique_tokens is not None:
            table["unique_tokens"] = np.minimum(tokens, unique_tokens)
        return table

    best = _lowest(lambda size: mean_of(fitted, rows(size)), largest)
    at = rows(np.array([best]))
    prediction = fitted.predict(at)
    span = np.geomspace(max(_SMALLEST, best / 1e3), min(largest, best * 1e3), 4 * _COARSE)
    good = span[mean_of(fitted, rows(span)) <= prediction.mean[0] * (1 + NEAR_OPTIMAL)]
    sizes = np.array([_lowest(draw, largest) for draw in _draws(fitted, rows)] or [best])
    ends = [(1 - fitted.level) / 2, (1 + fitted.level) / 2]
    ratios = tokens_for(flops, sizes, inference_tokens) / sizes
    tokens = float(at["tokens"][0])
    return Allocation(
        parameters=best,
        tokens=tokens,
        epochs=None if unique_tokens is None else max(1.0, tokens / unique_tokens),
        loss=float(prediction.mean[0]),
        loss_interval=(float(prediction.low[0]), float(prediction.high[0])),
        parameters_interval=_pair(np.quantile(sizes, ends)),
        tokens_per_parameter_interval=_pair(np.quantile(ratios, ends)),
        near_optimal=(float(good.min(initial=best)), float(good.max(initial=best))),
        flops=FLOPS_PER_TOKEN_AND_PARAMETER * best * tokens,
        extrapolation=float(prediction.extrapolation[0]),
        warnings=prediction.warnings,
    )


def cheapest(
    fitted: Fit | Blend, loss: float, *, inference_tokens: float = 0.0, max_parameters: float = 1e13
) -> tuple[float, float, float]:
    """(parameters, tokens, FLOPs of training and inference) that reach a loss at the least cost.

    Raises UserError when no size reaches it.
    """

    def tokens_to_reach(size: np.ndarray) -> np.ndarray:
        low, high = np.zeros_like(size), np.full_like(size, 40.0)  # ln tokens: 1 to 2e17
        for _ in range(60):
            middle = (low + high) / 2
            short = mean_of(fitted, {"parameters": size, "tokens": np.exp(middle)}) > loss
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        return np.where(high >= 40.0, np.inf, np.exp(high))

    def cost(size: np.ndarray) -> np.ndarray:
        return size * (FLOPS_PER_TOKEN_AND_PARAMETER * tokens_to_reach(size) + INFERENCE_FLOPS * inference_tokens)

    size = _lowest(cost, max_parameters)
    total = float(cost(np.array([size]))[0])
    if not math.isfinite(total):
        raise UserError(f"no model of up to {human(max_parameters)} parameters reaches a loss of {loss:g} by this law")
    return size, float(tokens_to_reach(np.array([size]))[0]), total


def tokens_for(flops: float, parameters: np.ndarray, inference_tokens: float = 0.0) -> np.ndarray:
    """Training tokens that a budget leaves for each size; at least one."""
    left = flops - INFERENCE_FLOPS * parameters * inference_tokens
    return np.maximum(left / (FLOPS_PER_TOKEN_AND_PARAMETER * parameters), 1.0)


def mean_of(fitted: Fit | Blend, table: dict[str, np.ndarray]) -> np.ndarray:
    """The prediction without interval or warnings, shape (rows,)."""
    if isinstance(fitted, Fit):
        return fitted.law.predict(table, fitted.coefficients)
    return np.asarray(sum(m.weight * m.fit.law.predict(table, m.fit.coefficients) for m in fitted.members))


def _draws(
    fitted: Fit | Blend, rows: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> list[Callable[[np.ndarray], np.ndarray]]:
    """The loss along N for each resample."""
    parts = [(1.0, fitted)] if isinstance(fitted, Fit) else [(m.weight, m.fit) for m in fitted.members]
    count = min(len(part.samples) for _, part in parts)

    def draw(index: int) -> Callable[[np.ndarray], np.ndarray]:
        def loss(size: np.ndarray) -> np.ndarray:
            table, total = rows(size), np.zeros_like(size)
            for weight, part in parts:
                names = [c.name for c in part.law.coefficients]
                total += weight * part.law.predict(table, dict(zip(names, part.samples[index].tolist(), strict=True)))
            return total

        return loss

    return [draw(index) for index in range(count)]


def _lowest(loss: Callable[[np.ndarray], np.ndarray], largest: float) -> float:
    """The size of the lowest loss between 1000 parameters and `largest`, to about one part in a million."""
    low, high = math.log(_SMALLEST), math.log(largest)
    points = _COARSE
    for _ in range(1 + _REFINEMENTS):
        grid = np.linspace(low, high, points)
        with np.errstate(all="ignore"):
            values = np.nan_to_num(loss(np.exp(grid)), nan=np.inf)
        at = int(np.argmin(values))
        low, high = float(grid[max(0, at - 1)]), float(grid[min(points - 1, at + 1)])
        points = _FINE
    return float(np.exp(grid[at]))


def _most_parameters(flops: float, inference_tokens: float) -> float:
    """Size at which one training token is left."""
    return flops / (FLOPS_PER_TOKEN_AND_PARAMETER + INFERENCE_FLOPS * inference_tokens)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])
