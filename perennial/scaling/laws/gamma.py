"""Loss of model size and tokens whose two terms are summed inside a power.

Formula: L = E + (A / N^alpha + B / D^beta)^gamma. L nats per token, N parameters, D training tokens.
Source: Caballero et al. 2022, "Broken Neural Scaling Laws", arXiv 2210.14891, has sums of terms inside one power;
    Kaplan et al. 2020, "Scaling Laws for Neural Language Models", arXiv 2001.08361, Eq. 1.5 is the case E = 0.
Differs: a ridge strength * (ln gamma)^2 on the fit's objective pulls gamma to 1, the plain sum of terms; without it
    extrapolation is up to twice as wrong where runs are few.
Limits: as for `chinchilla`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns
from perennial.scaling.laws.chinchilla import Chinchilla


class Gamma(Chinchilla):
    """6 coefficients, one of them held near 1."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {}
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (*two_terms.MAIN, two_terms.OUTER_EXPONENT)
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"strength": 0.0},
            "coefficients": {"E": 1.7, "A": 700.0, "B": 1800.0, "alpha": 0.36, "beta": 0.37, "gamma": 0.8},
            "inputs": {"parameters": (5e7, 2e10), "tokens": (5e8, 5e11)},
        },
        {
            "settings": {},
            "coefficients": {"E": 1.2, "A": 60.0, "B": 700.0, "alpha": 0.28, "beta": 0.42, "gamma": 1.0},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Of the ridge on ln gamma; 0 leaves gamma free."""

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + (A / N^alpha + B / D^beta)^gamma; with one exponent for both beta is alpha."""
        size, data = two_terms.terms(inputs, coefficients)
        return coefficients["E"] + (size + data) ** coefficients["gamma"]

    def starts(self, table: Columns) -> list[Coefficients]:
        return [{**start, "gamma": 1.0} for start in two_terms.starts(table)]

    def ridge(self) -> Mapping[str, tuple[float, float]]:
        return {"gamma": (1.0, self.strength)}
