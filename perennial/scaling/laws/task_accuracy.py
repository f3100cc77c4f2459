"""Accuracy of a task from its bits per byte (or loss): a sigmoid between chance and a ceiling.

Formula: accuracy = b + a / (1 + exp(k * (x - x0))). x bits per byte (or nats per token) of the right answers,
    b accuracy by chance, a + b the ceiling, x0 the middle of the rise, k its steepness (above 0: less is better).
Source: Bhagia et al. 2024, "Establishing Task Scaling Laws via Compute-Efficient Model Ladders", arXiv 2412.04403,
    section 3.2 (step 2; step 1 is a loss law of size and tokens fitted to x).
Differs: the paper writes the sigmoid with the other sign of k.
Limits: where no model of the table is above chance, x0 and k are not determined and nothing can be predicted.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from scipy.special import expit

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class TaskAccuracy(Law):
    """Second of two steps: size and tokens -> bits per byte of the answers -> accuracy."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("bits_per_byte", "bits/byte", "of the right answers"),)
    TARGET: ClassVar[Input] = Input("accuracy", "share", "of questions answered rightly")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("a", "share", 1e-3, 1.5, True, "rise from chance to the ceiling"),
        Coefficient("b", "share", 0.0, 0.9, False, "accuracy by chance", vanishing="low"),
        Coefficient("k", "byte/bit", 1e-2, 200.0, True, "steepness"),
        Coefficient("x0", "bits/byte", 1e-3, 20.0, True, "middle of the rise"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"a": 0.6, "b": 0.25, "k": 6.0, "x0": 0.8},
            "inputs": {"bits_per_byte": (0.3, 1.6)},
        },
    ]
    RESIDUAL: ClassVar = "linear"

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """b + a / (1 + exp(k (x - x0)))."""
        return coefficients["b"] + coefficients["a"] * _share_risen(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By a, b, k and x0."""
        risen = _share_risen(inputs, coefficients)
        slope = coefficients["a"] * risen * (1 - risen)
        distance = column(inputs, "bits_per_byte") - coefficients["x0"]
        return {"a": risen, "b": np.ones_like(risen), "k": -slope * distance, "x0": slope * coefficients["k"]}

    def starts(self, table: Columns) -> list[Coefficients]:
        """The range of the table, and rises at its quartiles."""
        x, accuracy = column(table, "bits_per_byte"), column(table, "accuracy")
        low, high = float(accuracy.min()), float(accuracy.max())
        width = max(float(np.ptp(x)), 1e-6)
        middles = np.quantile(x, (0.1, 0.3, 0.5, 0.7)).tolist()
        return [{"a": max(high - low, 0.01), "b": low, "k": 6 / width, "x0": middle} for middle in middles]


def _share_risen(inputs: Columns, coefficients: Coefficients) -> np.ndarray:
    return np.asarray(expit(-coefficients["k"] * (column(inputs, "bits_per_byte") - coefficients["x0"])))
