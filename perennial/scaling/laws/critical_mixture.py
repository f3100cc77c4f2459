"""Largest share of new data that keeps the old loss, of the tokens trained: a power law.

Formula: share = a * T^s + b. T training tokens of the continuation.
Source: Gu et al. 2024, "CMR Scaling Law: Predicting Critical Mixture Ratios for Continual Pre-training of Language
    Models", arXiv 2407.17467, section 4; there the old loss may rise by 0.05 nats.
Limits: one model, pair of corpora and tolerance. `PUBLISHED_SHARES` of `scaling.continual` holds the paper's shares by
    model size; they grow with it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class CriticalMixture(Law):
    """Three coefficients; each row is the critical share found at one number of tokens."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("tokens", "tokens", "of the continuation"),)
    TARGET: ClassVar[Input] = Input("share", "share", "of new data, at most, that keeps the old loss")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("a", "share", 1e-12, 1e12, True, "growth of the share", ("decay", "tokens")),
        Coefficient("decay", "1", -3.0, 3.0, False, "minus s: exponent of tokens"),
        Coefficient("b", "share", -2.0, 2.0, False, "share that does not depend on tokens"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"a": 0.002, "decay": -0.2, "b": 0.1},
            "inputs": {"tokens": (1e9, 1e11)},
        },
    ]
    IDENTIFIES: ClassVar[Literal["coefficients", "curve"]] = "curve"
    RESIDUAL: ClassVar[Literal["log", "linear"]] = "linear"

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """a T^s + b, with s = -decay."""
        return coefficients["a"] * column(inputs, "tokens") ** -coefficients["decay"] + coefficients["b"]

    def starts(self, table: Columns) -> list[Coefficients]:
        """Straight-line fits of a and b for several exponents."""
        tokens, share = column(table, "tokens"), column(table, "share")
        found = []
        for decay in (-0.8, -0.4, -0.15, 0.15, 0.4, 0.8):
            design = np.stack([tokens**-decay, np.ones_like(tokens)], axis=1)
            solved = np.linalg.lstsq(design, share, rcond=None)[0]
            if solved[0] > 0:
                error = float(np.sum((design @ solved - share) ** 2))
                found.append((error, {"a": float(solved[0]), "decay": decay, "b": float(solved[1])}))
        fallback = {"a": 1e-3, "decay": -0.1, "b": float(share.mean())}
        return [start for _, start in sorted(found, key=lambda pair: pair[0])[:3]] or [fallback]
