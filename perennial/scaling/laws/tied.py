"""Loss of model size and tokens with one exponent for both, for tables of few runs.

Formula: L = E + A / N^alpha + B / D^alpha. L nats per token, N parameters, D training tokens.
Source: Gadre et al. 2024, "Language models scale reliably with over-training and on downstream tasks",
    arXiv 2403.08540, section 2 (in the coordinates of `over_training`, which is this law in FLOPs and tokens per
    parameter); Muennighoff et al. 2023, arXiv 2305.16264, appendix A ties the exponents as well.
Limits: implies that the best model size grows as the square root of compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class Tied(Law):
    """Four coefficients."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        two_terms.IRREDUCIBLE,
        two_terms.SIZE_WEIGHT,
        Coefficient("B", "nats/token", 0.0, np.inf, True, "weight of the data term", ("alpha", "tokens")),
        Coefficient("alpha", "1", 0.01, 2.0, False, "exponent of size and of data"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 1.8, "A": 150.0, "B": 280.0, "alpha": 0.267},
            "inputs": {"parameters": (1e7, 7e9), "tokens": (2e8, 1e12)},
        },
        {
            "settings": {},
            "coefficients": {"E": 1.1, "A": 900.0, "B": 2500.0, "alpha": 0.45},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N^alpha + B / D^alpha."""
        size, data = two_terms.terms(inputs, coefficients)
        return coefficients["E"] + size + data

    def starts(self, table: Columns) -> list[Coefficients]:
        return [*two_terms.tied_starts(table)]

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray]:
        return two_terms.gradient(inputs, coefficients)

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)
