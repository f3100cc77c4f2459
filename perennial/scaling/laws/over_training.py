"""Loss of compute and tokens per parameter: what training a small model for long costs.

Formula: L = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D FLOPs, M = D / N; L nats per token, N parameters, D tokens.
    It is `tied` with alpha = 2 eta, A = a 6^-eta, B = b 6^-eta; the best M is b / a to the power of 1 / (2 eta).
Source: Gadre et al. 2024, "Language models scale reliably with over-training and on downstream tasks",
    arXiv 2403.08540, Eq. 4.
Limits: tokens per parameter below 10 break it, and every other form: warm-up rules such runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class OverTraining(Law):
    """Four coefficients."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        two_terms.IRREDUCIBLE,
        Coefficient("a", "nats/token", 1e-9, 1e15, True, "weight of what too small a model costs"),
        Coefficient("b", "nats/token", 1e-9, 1e15, True, "weight of what too few tokens cost"),
        Coefficient("eta", "1", 0.005, 1.0, False, "exponent of compute; half that of size and of data"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136},
            "inputs": {"parameters": (1e7, 7e9), "tokens": (2e8, 1e12)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "gadre_2024_redpajama": {
            "coefficients": {"E": 1.837, "a": 212.2, "b": 366.7, "eta": 0.13645},
            "source": "refit of Gadre et al. 2024, arXiv 2403.08540, RedPajama models on C4",
        },
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + (a M^eta + b M^-eta) C^-eta."""
        size, data = _terms(inputs, coefficients)
        return coefficients["E"] + size + data

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray]:
        size, data = _terms(inputs, coefficients)
        log_six = np.log(two_terms.FLOPS_PER_TOKEN_AND_PARAMETER)
        by_size = size * (log_six + 2 * np.log(column(inputs, "parameters")))
        by_data = data * (log_six + 2 * np.log(column(inputs, "tokens")))
        a, b = size / coefficients["a"], data / coefficients["b"]
        return {"E": np.ones_like(size), "a": a, "b": b, "eta": -by_size - by_data}

    def starts(self, table: Columns) -> list[Coefficients]:
        """Those of `tied`, in these coordinates."""
        found = []
        for start in two_terms.tied_starts(table):
            eta = start["alpha"] / 2
            scale = two_terms.FLOPS_PER_TOKEN_AND_PARAMETER**eta
            found.append({"E": start["E"], "a": start["A"] * scale, "b": start["B"] * scale, "eta": eta})
        return [*found]

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)


def _terms(inputs: Columns, c: Coefficients) -> tuple[np.ndarray, np.ndarray]:
    """a M^eta C^-eta = a 6^-eta N^(-2 eta) and b M^-eta C^-eta = b 6^-eta D^(-2 eta)."""
    scale = two_terms.FLOPS_PER_TOKEN_AND_PARAMETER ** -c["eta"]
    power = -2 * c["eta"]
    return c["a"] * scale * column(inputs, "parameters") ** power, c["b"] * scale * column(inputs, "tokens") ** power
