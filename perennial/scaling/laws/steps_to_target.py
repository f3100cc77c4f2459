"""Updates needed to reach a loss, of the batch size: a floor of updates and one of tokens.

Formula: S = a + b / B. S updates, B tokens (or sequences) per update; a the fewest updates that any batch needs, b the
    fewest tokens (or sequences). b / a is the noise scale: at that batch both are twice their minimum.
Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, Eq. 2.11;
    Zhang et al. 2024, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676, section 3.
Limits: one model and one target loss, with learning rate and the rest tuned at each batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class StepsToTarget(Law):
    """Two coefficients from runs that reach the same loss with different batches."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("batch", "tokens", "of one update (or sequences, as b then is)"),)
    TARGET: ClassVar[Input] = Input("steps", "updates", "until the target loss is reached")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("a", "updates", 1e-3, 1e12, True, "fewest updates"),
        Coefficient("b", "tokens", 1e-3, 1e18, True, "fewest tokens"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"settings": {}, "coefficients": {"a": 1300.0, "b": 1.45e9}, "inputs": {"batch": (3e4, 8e6)}},
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """a + b / B."""
        return coefficients["a"] + coefficients["b"] / column(inputs, "batch")

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By a and b."""
        batch = column(inputs, "batch")
        return {"a": np.ones_like(batch), "b": 1 / batch}

    def starts(self, table: Columns) -> list[Coefficients]:
        """Fewest updates and fewest tokens seen."""
        steps, batch = column(table, "steps"), column(table, "batch")
        return [{"a": 0.8 * float(steps.min()), "b": 0.8 * float((steps * batch).min())}]
