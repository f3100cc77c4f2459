"""Loss of model size and tokens where the data term's weight and exponent change with size.

Formula: L = exp(a3 n^g + b3) + exp(a2 n^b + b2) * d^(-exp(a1 n^a + b1)); n = N / 1e9, d = D / 1e9 (N parameters, D
    tokens), L nats per token. Nine coefficients.
Source: Li et al. 2025, "Predictable Scale: Part II, Farseer: A Refined Scaling Law in Large Language Models",
    arXiv 2506.10972, Eq. 8.
Differs: a small ridge on the six coefficients that multiply or raise n keeps the search off flat directions.
Limits: needs 45 runs; on 27 it was 18 to 26% wrong where five coefficients were 1 to 2% wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_UNIT = 1e9


class Farseer(Law):
    """Nine coefficients; never below 45 rows."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("a1", "1", -10.0, 10.0, False, "how the data exponent changes with size"),
        Coefficient("b1", "1", -10.0, 5.0, False, "logarithm of the data exponent, less that change"),
        Coefficient("a", "1", -3.0, 3.0, False, "power of size in the data exponent"),
        Coefficient("a2", "1", -20.0, 20.0, False, "how the data weight changes with size"),
        Coefficient("b2", "1", -20.0, 20.0, False, "logarithm of the data weight, less that change"),
        Coefficient("b", "1", -3.0, 3.0, False, "power of size in the data weight"),
        Coefficient("a3", "1", -20.0, 20.0, False, "how the loss at unlimited data changes with size"),
        Coefficient("b3", "1", -20.0, 20.0, False, "logarithm of that loss, less that change"),
        Coefficient("g", "1", -3.0, 3.0, False, "power of size in the loss at unlimited data"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"strength": 0.0},
            "coefficients": {
                "a1": -0.12,
                "b1": -0.95,
                "a": 0.12,
                "a2": 0.1,
                "b2": 0.0,
                "b": -0.2,
                "a3": 0.3,
                "b3": 0.4,
                "g": -0.17,
            },
            "inputs": {"parameters": (5e7, 2e10), "tokens": (5e8, 5e11)},
        },
    ]
    IDENTIFIES: ClassVar = "curve"
    MIN_ROWS_PER_COEFFICIENT: ClassVar[float] = 5.0

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Of the ridge on a1, a2, a3, a, b and g; 0 leaves them free."""

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """exp(a3 n^g + b3) + exp(a2 n^b + b2) * d^(-exp(a1 n^a + b1))."""
        floor, data, _, _ = _parts(inputs, coefficients)
        return floor + data

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray]:
        floor, data, exponent, log_size = _parts(inputs, coefficients)
        c = coefficients
        by_exponent = -data * np.log(column(inputs, "tokens") / _UNIT) * exponent
        result = {"b1": by_exponent, "b2": data, "b3": floor}
        for outer, power, inner in (("b1", "a", "a1"), ("b2", "b", "a2"), ("b3", "g", "a3")):
            raised = np.exp(c[power] * log_size)
            result[inner] = result[outer] * raised
            result[power] = result[inner] * c[inner] * log_size
        return result

    def starts(self, table: Columns) -> list[Coefficients]:
        """From the plain two terms: the size term becomes part of the floor."""
        found = []
        for start in two_terms.starts(table)[:4]:
            size = start["A"] * _UNIT ** -start["alpha"]
            data = start["B"] * _UNIT ** -start["beta"]
            floor = {"a3": size / (start["E"] + size), "b3": float(np.log(start["E"])), "g": -start["alpha"]}
            for sign in (1.0, -1.0):
                slope = {"a1": -0.1 * sign, "b1": float(np.log(start["beta"])) + 0.1 * sign, "a": 0.1}
                weight = {"a2": 0.1 * sign, "b2": float(np.log(data)) - 0.1 * sign, "b": -0.1}
                found.append({**slope, **weight, **floor})
        return [*found]

    def ridge(self) -> Mapping[str, tuple[float, float]]:
        return dict.fromkeys(("a1", "a2", "a3", "a", "b", "g"), (0.0, self.strength))

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)


def _parts(inputs: Columns, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loss at unlimited data, data term, data exponent, ln n; shape (rows,) each."""
    log_size = np.log(column(inputs, "parameters") / _UNIT)
    exponent = _exp(c["a1"] * np.exp(c["a"] * log_size) + c["b1"])
    weight = c["a2"] * np.exp(c["b"] * log_size) + c["b2"]
    data = _exp(weight - exponent * np.log(column(inputs, "tokens") / _UNIT))
    return _exp(c["a3"] * np.exp(c["g"] * log_size) + c["b3"]), data, exponent, log_size


def _exp(power: np.ndarray) -> np.ndarray:
    """exp, held below 1e130: a search that strays there is turned back by a number, not lost to infinity."""
    return np.exp(np.minimum(power, 300.0))
