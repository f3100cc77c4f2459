"""Loss of model size and tokens: one exponent for both, their terms summed inside a power.

Formula: L = E + (A / N^alpha + B / D^alpha)^gamma. L nats per token, N parameters, D training tokens.
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
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class TiedGamma(Law):
    """5 coefficients, one of them held near 1."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        two_terms.IRREDUCIBLE,
        two_terms.SIZE_WEIGHT,
        Coefficient("B", "nats/token", 0.0, np.inf, True, "weight of the data term", ("alpha", "tokens")),
        Coefficient("alpha", "1", 0.01, 2.0, False, "exponent of size and of data"),
        two_terms.OUTER_EXPONENT,
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"strength": 0.0},
            "coefficients": {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.33, "gamma": 0.8},
            "inputs": {"parameters": (1e7, 7e9), "tokens": (2e8, 1e12)},
        },
        {
            "settings": {},
            "coefficients": {"E": 1.1, "A": 900.0, "B": 2500.0, "alpha": 0.45, "gamma": 1.0},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """Of the ridge on ln gamma; 0 leaves gamma free."""

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + (A / N^alpha + B / D^alpha)^gamma."""
        size, data = two_terms.terms(inputs, coefficients)
        return coefficients["E"] + (size + data) ** coefficients["gamma"]

    def starts(self, table: Columns) -> list[Coefficients]:
        return [{**start, "gamma": 1.0} for start in two_terms.tied_starts(table)]

    def ridge(self) -> Mapping[str, tuple[float, float]]:
        return {"gamma": (1.0, self.strength)}

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray]:
        return two_terms.gradient(inputs, coefficients)

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)
