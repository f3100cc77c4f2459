"""What a batch size costs in updates and tokens: noise scale, critical batch, and how it grows with the model.

Symbols: B batch, S updates, E = S B tokens, B_noise noise scale; all batches in the same unit, tokens or sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from perennial.core.errors import UserError
from perennial.scaling.fitting import Fit, as_columns, fit
from perennial.scaling.laws.base import column
from perennial.scaling.laws.batch_size import BatchSize
from perennial.scaling.laws.steps_to_target import StepsToTarget

LEAST_SQUARES = 10.0
"""A Huber threshold that no logarithm of a ratio reaches: rows are few, and each is a best of a sweep."""


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise from squared norms of gradients over two batch sizes."""

    batch: float
    """B_noise = variance / signal, in the unit of the batches; nan where the signal drowns in noise."""
    signal: float
    """Squared norm of the true gradient."""
    variance: float
    """Trace of the covariance of one token's (or sequence's) gradient."""


def noise_scale(*, small_batch: float, small_norm: float, big_batch: float, big_norm: float) -> NoiseScale:
    """The simple noise scale from mean squared gradient norms over small and big batches, both unbiased estimates.

    Average the squared norms over many updates first: one pair alone is mostly noise. Raises UserError for batches that
    are not of two sizes.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1.
    """
    if not 0 < small_batch < big_batch:
        raise UserError(f"a noise scale needs two batch sizes, 0 < small < big, not {small_batch:g} and {big_batch:g}")
    signal = (big_batch * big_norm - small_batch * small_norm) / (big_batch - small_batch)
    variance = (small_norm - big_norm) / (1 / small_batch - 1 / big_batch)
    batch = variance / signal if signal > 0 and variance >= 0 else float("nan")
    return NoiseScale(batch=batch, signal=signal, variance=variance)


def updates_factor(batch: ArrayLike, noise_batch: float) -> np.ndarray:
    """How many times the fewest possible updates a batch needs: 1 + B_noise / B.

    Source: McCandlish et al. 2018, arXiv 1812.06162, Eq. 2.11.
    """
    return 1 + noise_batch / np.asarray(batch, dtype=np.float64)


def tokens_factor(batch: ArrayLike, noise_batch: float) -> np.ndarray:
    """How many times the fewest possible tokens a batch needs: 1 + B / B_noise.

    Source: McCandlish et al. 2018, arXiv 1812.06162, Eq. 2.11.
    """
    return 1 + np.asarray(batch, dtype=np.float64) / noise_batch


def critical_batch(steps: Mapping[str, float], *, reference: float, overhead: float = 0.2) -> float:
    """The batch that needs `overhead` more tokens than the reference batch: (1 + overhead) B_ref + overhead b / a.

    `steps` are the coefficients of `steps_to_target`.

    Source: Zhang et al. 2024, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676, section 3.
    """
    return (1 + overhead) * reference + overhead * steps["b"] / steps["a"]


@dataclass(frozen=True)
class CriticalBatch:
    """How the critical batch and the noise scale grow with the size of the model, shapes (sizes,)."""

    parameters: np.ndarray
    batches: np.ndarray
    noise_scales: np.ndarray
    law: Fit
    """Of `batch_size`: critical batch of parameters."""
    residual: float
    """Root mean square of ln(updates), measured less fitted."""


def fit_critical_batch(
    table: Mapping[str, ArrayLike], *, reference: float, overhead: float = 0.2, bootstrap: int = 0, seed: int = 0
) -> CriticalBatch:
    """Critical batch of each model size and its power law, from columns parameters, batch and steps (to one loss).

    Batches in one unit throughout; the result is in it. Raises UserError for a size with fewer than two batches.
    """
    columns = as_columns(table)
    parameters, batch, steps = (column(columns, name) for name in ("parameters", "batch", "steps"))
    sizes = np.unique(parameters)
    batches, noise, residuals = [], [], []
    for size in sizes:
        rows = parameters == size
        if len(np.unique(batch[rows])) < 2:
            raise UserError(f"size {size:g}: a critical batch needs runs with two batch sizes or more")
        curve = fit(StepsToTarget(), {"batch": batch[rows], "steps": steps[rows]}, delta=LEAST_SQUARES, bootstrap=0)
        batches.append(critical_batch(curve.coefficients, reference=reference, overhead=overhead))
        noise.append(curve.coefficients["b"] / curve.coefficients["a"])
        predicted = curve.law.predict({"batch": batch[rows]}, curve.coefficients)
        residuals.append(np.log(predicted / steps[rows]))
    law = fit(
        BatchSize(follows="parameters"),
        {"parameters": sizes, "batch": np.array(batches)},
        delta=LEAST_SQUARES,
        bootstrap=bootstrap,
        seed=seed,
    )
    residual = float(np.sqrt(np.mean(np.concatenate(residuals) ** 2)))
    return CriticalBatch(sizes, np.array(batches), np.array(noise), law, residual)
