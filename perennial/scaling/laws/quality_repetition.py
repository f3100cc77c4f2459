"""Error after some epochs of a pool of data: a power law whose exponent halves every few epochs.

Formula: y = d + A * n_1^{-b_1} * prod_{j=2..k} (n_j / n_{j-1})^{-b_j} with b_j = b * (1/2)^{(j-1) / tau} and n_j
    samples seen after epoch j; the last epoch may be part of one. y error, a share; b utility of fresh data; tau epochs
    after which a repetition is worth half.
Source: Goyal et al. 2024, "Scaling Laws for Data Filtering: Data Curation cannot be Compute Agnostic",
    arXiv 2404.07177, section 3 (Eq. 3 to 6); constants from the code of the paper.
Differs: the paper multiplies the samples by a; A is a^-b, which a fit determines far better.
Limits: fitted to CLIP, samples are image-text pairs; for text re-fit it with tokens as samples. Several pools: see
    `scaling.filtering`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

SAMPLE_SCALE = 0.025 / 1e5
"""a of the paper, per sample, common to all of its pools."""


def _entry(place: str, b: float, tau: float) -> dict[str, Any]:
    source = f"Goyal et al. 2024, arXiv 2404.07177, code, {place} of the data by quality"
    return {"coefficients": {"A": SAMPLE_SCALE**-b, "b": b, "tau": tau, "d": 0.1}, "source": source}


class QualityRepetition(Law):
    """Four coefficients of one pool; a better pool has a higher b, a more diverse one a higher tau."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        Input("unique_samples", "samples", "in the pool"),
        Input("samples", "samples", "seen, repeats counted"),
    )
    TARGET: ClassVar[Input] = Input("error", "share", "of the evaluation")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("A", "share", 0.0, np.inf, True, "what the first sample leaves to gain", ("b", "samples")),
        Coefficient("b", "1", 1e-3, 5.0, False, "utility of fresh data"),
        Coefficient("tau", "epochs", 0.05, 1e4, True, "epochs that halve the utility"),
        Coefficient("d", "share", 1e-6, 0.99, True, "error that no data lower"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"A": 11.4, "b": 0.16, "tau": 6.7, "d": 0.1},
            "inputs": {"unique_samples": (1e7, 4e7), "samples": (1e7, 4e8)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "best_10_percent": _entry("best 10%", 0.16, 6.7),
        "10_to_20_percent": _entry("10 to 20%", 0.125, 8.5),
        "20_to_30_percent": _entry("20 to 30%", 0.10, 5.3),
        "30_to_40_percent": _entry("30 to 40%", 0.085, 2.3),
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """d + A n_1^{-b_1} prod (n_j / n_{j-1})^{-b_j}."""
        fresh, repeats, _ = _growth(inputs, coefficients["tau"])
        return coefficients["d"] + coefficients["A"] * _power(-coefficients["b"] * (fresh + repeats))

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all four."""
        c = coefficients
        fresh, repeats, by_tau = _growth(inputs, c["tau"])
        left = _power(-c["b"] * (fresh + repeats))
        return {
            "A": left,
            "b": -c["A"] * (fresh + repeats) * left,
            "tau": -c["A"] * c["b"] * by_tau * left,
            "d": np.ones_like(left),
        }

    def starts(self, table: Columns) -> list[Coefficients]:
        """Straight-line fits of A and d over a grid of b and tau, the best first."""
        error = column(table, "error")
        found: list[tuple[float, dict[str, float]]] = []
        for tau in (0.7, 2.0, 6.0, 20.0, 200.0):
            fresh, repeats, _ = _growth(table, tau)
            for b in (0.05, 0.1, 0.2, 0.4, 0.8):
                left = _power(-b * (fresh + repeats - fresh.mean()))
                solved = np.linalg.lstsq(np.stack([left, np.ones_like(left)], axis=1), error, rcond=None)[0]
                weight, floor = np.maximum(solved, 1e-3 * float(error.min())).tolist()
                misfit = float(np.sum((weight * left + floor - error) ** 2))
                scaled = weight * float(np.exp(b * fresh.mean()))
                found.append((misfit, {"A": scaled, "b": b, "tau": tau, "d": min(0.98, floor)}))
        found.sort(key=lambda pair: pair[0])
        return [start for _, start in found[:3]]


def _growth(inputs: Columns, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln n_1, what the repeats add to it by their utility, and the latter's derivative by tau, shape (rows,)."""
    unique, samples = column(inputs, "unique_samples"), column(inputs, "samples")
    epochs = samples / unique
    most = min(np.ceil(epochs.max() - 1e-9), 60 * tau + 2)  # 2^-60 of an epoch is nothing
    done = np.arange(1, int(most))
    gained = np.log(np.clip(epochs[:, None], done, done + 1) / done)  # (rows, epochs after the first)
    worth = 0.5 ** (done / tau)
    repeats, by_tau = gained @ worth, gained @ (worth * done * np.log(2) / tau**2)
    return np.log(np.minimum(unique, samples)), repeats, by_tau


def _power(exponent: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(exponent, -300.0, 300.0))
